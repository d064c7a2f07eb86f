"""One engine as placements see it: what it is doing, and what adding a call would cost.

It is dead-reckoned from the calls placed on it, with what other routers have placed there and what
its prefix cache probably holds, by the prompts that were sent.

In-flight accounting in tokens is primary: it has no lag. Telemetry corrects rates. The prediction
is a closed form of vLLM V1's batching: a call waits for a sequence slot, then for the prefill
ahead of it, then decodes in a batch whose steps prefill chunks of other calls lengthen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from heapq import heappop, heappush
from statistics import median
from typing import Final, NamedTuple

from hexgen_vllm.policy.calls import (
    Demand,
    Forecast,
    InFlight,
)
from hexgen_vllm.policy.cost import (
    UNMEASURED,
    CostFit,
    trust,
    trusted_cost,
)
from hexgen_vllm.policy.prefix_index import PrefixIndex
from hexgen_vllm.types import (
    Call,
    CallResult,
    EngineKind,
    EngineReport,
    EngineSpec,
    EngineState,
    Role,
    StepCost,
)

_USUAL_PROMPT: Final = 2500
_USUAL_OUTPUT: Final = 110
_MAX_SHARE: Final = 0.8
_SHARE_WEIGHT: Final = 0.05  # least, of the newest report in the share of prefill
_DEFAULT_SLOTS: Final = 256
_READY: Final = EngineState.READY  # compiled, a lookup in the class costs more than an engine may
_TRIAL: Final = EngineState.TRIAL
_PREFILL: Final = Role.PREFILL
_DECODE: Final = Role.DECODE
_LEAST_MOVED: Final = 64  # tokens; fixed times outweigh what less takes
_ENOUGH_MOVED: Final = 4  # calls


class Elsewhere(NamedTuple):
    """Load on an engine that this coordinator has not placed.

    Attributes:
        calls: in flight.
        prefill_tokens: prompt tokens of calls without a first token.
        context_tokens: prompt tokens of all of them.
        output_tokens: output tokens to come.
    """

    calls: int = 0
    prefill_tokens: int = 0
    context_tokens: int = 0
    output_tokens: int = 0

    @classmethod
    def total(cls, parts: Iterable[Elsewhere]) -> Elsewhere:
        """Return the sum of ``parts``."""
        columns = list(zip(*parts, strict=True))
        return cls(*(sum(column) for column in columns)) if columns else cls()


class TransferRate:
    """Seconds in which the KV of a token reaches an engine, the median of late.

    A transfer takes some time however short it is, as does the step that the answer joins. Spread
    over the few tokens that are missing where prompts share beginnings, that would be many times
    what a token of a long prompt takes. So only the longest of late tell.
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[int, float]] = deque(maxlen=32)  # tokens, seconds of each
        self._median_s: float | None = None

    def learn(self, tokens: int, seconds: float) -> None:
        """Take in that the KV of so many tokens took so long."""
        if tokens >= _LEAST_MOVED:
            self._seen.append((tokens, max(seconds, 0.0) / tokens))
            if len(self._seen) >= _ENOUGH_MOVED:
                most = sorted(self._seen)[-_ENOUGH_MOVED][0]
                self._median_s = median([each for n, each in self._seen if 2 * n >= most])

    def token_s(self, otherwise_s: float) -> float:
        """Return what was measured, ``otherwise_s`` until then."""
        return otherwise_s if self._median_s is None else self._median_s


def solo_speed(cost: StepCost) -> float:
    """Return usual calls of text-to-SQL per second, one at a time, that ``cost`` allows."""
    return 1.0 / (cost.prefill_s(_USUAL_PROMPT) + _USUAL_OUTPUT * cost.step_s(1))


class EngineLoad:
    """One engine as dispatch sees it (mutable, owned by the coordinator).

    Attributes:
        spec: what it said when it joined.
        engine_id: its name.
        slots: sequences it runs at once.
        state: whether it gets calls.
        report: its latest telemetry; set by :meth:`reported`.
        error: how far its steps are from what was measured of it, ``None`` when that is unknown.
        doubted: its rates are not to be believed in full, and there are no earlier ones that were.
        prefixes: what its prefix cache probably holds.
        in_flight: calls placed on it, by id.
        calls: how many are in flight here, of this coordinator and others.
        demoted: how many of this coordinator's were placed as demoted.
        assigned_s: W_e of the paper, service seconds ever assigned.
        traffic_fit: step cost learned from its answers.
        fitted_s: when its step cost was last learned, by itself or from its answers; when it
            joined as long as it never was.
        transfer: how fast KV comes here from prefill engines.
        finish_s, delay_s, bound_s: for a placement to note what it finds of each engine while it
            chooses; nothing before and after that.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.engine_id = spec.engine_id
        self.slots = spec.max_num_seqs or _DEFAULT_SLOTS
        self.state = _READY
        self.report = EngineReport()
        self.prefixes = PrefixIndex(spec.kv_tokens)
        self.in_flight: dict[str, InFlight] = {}
        self.calls = self.demoted = 0
        self.finish_s = self.delay_s = self.bound_s = 0.0
        self._elsewhere = Elsewhere()
        self.assigned_s = 0.0
        self.traffic_fit = CostFit(min_steps=12)
        self.fitted_s = 0.0
        self.transfer = TransferRate()
        self.error: float | None = None
        self.doubted = False
        self._told: tuple[StepCost, float | None] | None = None  # what others learned of it
        self._cost: StepCost | None = None
        self._believed: StepCost | None = None  # the last cost that could be trusted in full
        self._prefill_share = 0.0  # as reported, smoothed
        self._shares_seen = 0
        self._queued_prefill = 0
        self._context = 0
        self._waiting: dict[str, InFlight] = {}  # no first token yet
        self._unseen: list[tuple[float, str]] = []  # heap of predicted starts nobody will see
        self._unanswered = 0  # calls of which no token was seen
        self._token_s = -1.0  # below 0: to be found anew
        self._left: dict[str, int] = {}  # output tokens to come, by call
        self._left_sum = 0
        self._left_sorted: list[int] = []  # empty: to be sorted anew
        self._left_least = -1  # the first of them; below 0: to be found anew

    @property
    def elsewhere(self) -> Elsewhere:
        """What others have placed on it."""
        return self._elsewhere

    @elsewhere.setter
    def elsewhere(self, found: Elsewhere) -> None:
        self._elsewhere = found
        self.calls = len(self.in_flight) + found.calls
        self._token_s = -1.0
        self._left_changed()

    def serves(self, call: Call) -> bool:
        """Whether the engine takes new calls for the call's model."""
        return self.open and self.knows(call)

    @property
    def at_work(self) -> bool:
        """Whether it gets calls, if only one at a time."""
        return self.state is _READY or self.state is _TRIAL

    @property
    def open(self) -> bool:
        """Whether it takes a new call; on trial, one that it has not begun to answer."""
        return self.state is _READY or (self.state is _TRIAL and not self._unanswered)

    def knows(self, call: Call) -> bool:
        """Whether it has the call's model."""
        return self.has(call.model) and self.is_home(call)

    def is_home(self, call: Call) -> bool:
        """Whether the call may run here: some follow what only one engine has."""
        return call.engine is None or call.engine == self.engine_id.partition("@")[0]

    def has(self, model: str) -> bool:
        """Whether it answers calls of a model."""
        return self.answers and self.computes(model)

    @property
    def answers(self) -> bool:
        """Whether it does more than compute prompts."""
        return self.spec.role is not _PREFILL

    @property
    def decodes_only(self) -> bool:
        """Whether prompts are computed for it elsewhere."""
        return self.spec.role is _DECODE

    def computes(self, model: str) -> bool:
        """Whether it has a model."""
        return not self.spec.models or model in self.spec.models

    def cost(self) -> StepCost | None:
        """Return the step cost to reckon with, ``None`` when nothing is known.

        What was measured, as far as its error allows (:func:`trusted_cost`), telemetry first, own
        traffic second; for the rest what was measured when it could be trusted. A cost that was
        never believed even in part is unknown; of one that is believed in part only, without an
        earlier one, :attr:`doubted` says so, and who knows other engines can correct it.
        """
        return self._cost

    def least_cost(self) -> StepCost | None:
        """Return the step cost if it is as low as its error allows, ``None`` when unknown."""
        cost, error = self._cost, self.error
        if cost is None or error is None or trust(error) >= 1.0:
            return cost
        return cost.scaled(1.0 / (1.0 + error))

    def reported(self, report: EngineReport, now: float | None = None) -> None:
        """Take in telemetry."""
        if now is not None and report.cost is not None and report.cost != self.report.cost:
            self.fitted_s = now
        self.report = report
        share = report.prefill_share
        if share is not None:
            # What an engine tells is of its last few seconds: where calls went by that, they would
            # follow what it happened to get, all at once.
            self._shares_seen += 1
            weight = max(1.0 / self._shares_seen, _SHARE_WEIGHT)
            self._prefill_share += weight * (share - self._prefill_share)
        self._judge()

    def _judge(self) -> None:
        """Decide which cost to reckon with."""
        self._token_s = -1.0
        fit, error = self.report.cost, self.report.fit_error
        if fit is None:
            fit, error = self.traffic_fit.cost(), self.traffic_fit.error()
        if fit is None and self._told is not None:
            fit, error = self._told
        if fit is not None and not fit.step_s(1) > 0.0:
            fit = None  # a step that takes no time was not measured
        self.error = None if fit is None else error
        believed, share = self._believed, trust(error)
        self.doubted = False
        if fit is None:
            self._cost = believed = None
        elif share >= 1.0:
            self._cost = believed = fit
        elif believed is not None:
            self._cost = trusted_cost(fit, error, believed)
        else:
            self.doubted = share > 0.0
            self._cost = fit if share > 0.0 else None
        self._believed = believed

    def told(self, cost: StepCost, error: float | None) -> None:
        """Take in what another coordinator learned of its steps, to use until this one has."""
        self._told = cost, error
        self._judge()

    def learned(self) -> tuple[StepCost, float | None] | None:
        """Return what this coordinator's own traffic taught of its steps, for others."""
        cost = None if self.report.cost is not None else self.traffic_fit.cost()
        return None if cost is None else (cost, self.traffic_fit.error())

    def restarted(self, spec: EngineSpec, state: EngineState) -> None:
        """Forget what a restart makes untrue; calls in flight stay until their driver ends them."""
        self.spec = spec
        self.slots = spec.max_num_seqs or _DEFAULT_SLOTS
        self.state = state
        self.report = EngineReport()
        self.prefixes = PrefixIndex(spec.kv_tokens)
        self.traffic_fit = CostFit(min_steps=12)
        self._believed = self._told = None
        self._prefill_share, self._shares_seen = 0.0, 0
        self._judge()

    def placed(self, entry: InFlight) -> None:
        """Account for a call sent here."""
        self._token_s = -1.0
        self.in_flight[entry.call.call_id] = entry
        self.calls += 1
        self.demoted += entry.placement.background
        self._unanswered += 1
        self._queued_prefill += entry.placement.uncached_tokens
        self._context += entry.call.prompt_tokens
        self._waiting[entry.call.call_id] = entry
        self._left[entry.call.call_id] = left = entry.output_left()
        self._left_sum += left
        self._left_sorted.clear()
        self._left_least = min(self._left_least, left)
        if entry.starts_s is not None:
            heappush(self._unseen, (entry.starts_s, entry.call.call_id))
        self.prefixes.add(entry.call)

    def started(self, entry: InFlight) -> None:
        """Account for the first token of a call: its prefill is done."""
        moved_s, first_s = entry.moved_s, entry.first_token_s
        # With more calls than slots it may have waited for one.
        if moved_s is not None and first_s is not None and self.calls <= self.slots:
            step_s = 0.0 if self._cost is None else self.token_s(self._cost)
            self.transfer.learn(entry.moved_tokens, first_s - moved_s - step_s)
        self._unanswered -= 1
        self._prefilled(entry.call.call_id)
        self.progressed(entry)

    def presume(self, now: float) -> None:
        """Take calls for started whose first token is due by ``now`` and will not be seen."""
        while self._unseen and self._unseen[0][0] <= now:
            self._prefilled(heappop(self._unseen)[1])

    def _prefilled(self, call_id: str) -> None:
        entry = self._waiting.pop(call_id, None)
        if entry is not None:
            self._queued_prefill -= entry.placement.uncached_tokens

    def takes_prompt(self, entry: InFlight) -> None:
        """Account for a prompt that was to come from a prefill engine and has to be computed."""
        tokens = entry.moved_tokens
        if entry.call.call_id in self._waiting and tokens:
            entry.placement = replace(entry.placement, uncached_tokens=tokens, prefill=None)
            self._queued_prefill += tokens - 1
        entry.moved_tokens = 0

    def progressed(self, entry: InFlight) -> None:
        """Account for what a call has written, or is expected to write, since it was told last."""
        left, call_id = entry.output_left(), entry.call.call_id
        before = self._left[call_id]
        self._left_sum += left - before
        self._left[call_id] = left
        self._left_sorted.clear()
        if left < self._left_least:
            self._left_least = left
        elif before == self._left_least:
            self._left_least = -1

    def removed(self, call_id: str) -> InFlight | None:
        """Account for the end of a call, however it ended."""
        entry = self.in_flight.pop(call_id, None)
        if entry is not None:
            self.calls -= 1
            self.demoted -= entry.placement.background
            self._token_s = -1.0
            self._context -= entry.call.prompt_tokens
            self._unanswered -= not entry.started
            self._prefilled(call_id)
            left = self._left.pop(call_id)
            self._left_sum -= left
            self._left_sorted.clear()
            if left == self._left_least:
                self._left_least = -1
        return entry

    def _left_changed(self) -> None:
        self._left_sorted.clear()
        self._left_least = -1

    def learn(self, entry: InFlight, result: CallResult, now: float) -> None:
        """Fit the step cost from a call that ended, where the engine does not report its own."""
        if self.report.cost is not None or not result.output_tokens:
            return
        batch = (entry.batch + self.calls + 1) / 2
        if entry.batch > self.slots:
            return  # it queued in the engine for an unknown time
        prompt = result.prompt_tokens or entry.call.prompt_tokens
        uncached = entry.placement.uncached_tokens
        if result.cached_tokens is not None:
            uncached = max(prompt - result.cached_tokens, 1)
        context = prompt + result.output_tokens / 2
        seconds = now - entry.placed_s
        if entry.moved_s is not None:
            seconds = now - entry.moved_s - entry.moved_tokens * self.transfer.token_s(0.0)
        before = self.traffic_fit.cost()
        self.traffic_fit.observe_call(result.output_tokens, batch, context, uncached, seconds)
        if self.traffic_fit.cost() is not before:
            self.fitted_s = now
            self._judge()

    def speed(self) -> float:
        """Return usual calls per second, one at a time: as configured, else by measured cost."""
        told = self.spec.speed
        return solo_speed(self.cost() or UNMEASURED) if told is None else told

    def outstanding_tokens(self) -> int:
        """Return prompt tokens to prefill plus output tokens to come."""
        return self._queued_prefill + self._left_sum

    def own(self) -> Elsewhere:
        """Return what is placed here, for those to whom it is elsewhere."""
        tokens = self._queued_prefill, self._context, self._left_sum
        return Elsewhere(len(self.in_flight), *tokens)

    def context_tokens(self) -> int:
        """Return prompt tokens of all calls here."""
        return self._context + self.elsewhere.context_tokens

    def queued_prefill_tokens(self) -> int:
        """Return prompt tokens of calls whose first token has not come."""
        return self._queued_prefill

    def solo_s(self, demand: Demand, cost: StepCost) -> float:
        """Return the call's time alone on the idle engine without prefix cache (t_comp)."""
        call = demand.call
        step = cost.step_s(1, call.prompt_tokens)
        return cost.prefill_s(call.prompt_tokens) + demand.output_tokens * step

    def room(self, depth: int) -> bool:
        """Return whether fewer than ``depth`` calls are here beyond the sequence slots."""
        if self.calls >= self.slots + depth:
            return False
        return not self._unanswered or self.state is not _TRIAL

    def fullness(self) -> float:
        """Return the share of slots that is taken, or of time that goes to prompts, if it is more.

        Where prompts share little, an engine has all it can do while most of its slots are free.
        """
        taken = min(len(self.in_flight) / self.slots, 1.0)
        return max(taken, self._prefill_share) if taken else 0.0

    def token_s(self, cost: StepCost) -> float:
        """Return the seconds of an output token with one more call here, prefill included."""
        own = cost is self._cost
        if own and self._token_s >= 0.0:
            return self._token_s
        calls = self.calls + 1
        batch = min(self.slots, calls)
        context = self._context + self._elsewhere.context_tokens
        step = cost.step_s(batch, context * batch / calls)
        found = step / (1.0 - min(self._prefill_share, _MAX_SHARE))
        if own:
            self._token_s = found
        return found

    def least_finish_s(
        self,
        demand: Demand,
        cost: StepCost,
        cached: int,
        prefill_s: float,
        claims: int,
        steps: float,
    ) -> float:
        """Return what :meth:`forecast` says at least of the finish, at a part of its price.

        That is without the calls that wait here before it, but for the first of its slot.

        Args:
            demand: the call.
            cost: the engine's step cost.
            cached: tokens of its prompt that need no prefill.
            prefill_s: seconds of that of the others, were they computed here.
            claims: as for :meth:`forecast`.
            steps: that it takes after its prefill.
        """
        wait = self._soonest_end() if self.calls + claims >= self.slots else 0
        arrives_s = None if demand.handover is None else self.arrives_s(demand, cost, cached)
        if arrives_s is not None:
            return max(arrives_s, wait * self.token_s(cost)) + steps * self.token_s(cost)
        return prefill_s + (steps + wait) * self.token_s(cost)

    def arrives_s(self, demand: Demand, cost: StepCost, cached: int) -> float | None:
        """Return the seconds until the KV of a prompt is here, were it computed elsewhere.

        Args:
            demand: the call.
            cost: the engine's step cost.
            cached: tokens of its prompt that are here.

        Returns:
            ``None`` where the engine had better compute it itself, by the rule of
            :mod:`~hexgen_vllm.policy.disaggregation`.
        """
        handover = demand.handover
        if handover is None or not self.decodes_only:
            return None
        uncached = max(demand.call.prompt_tokens - cached, 1)
        move_s = uncached * self.transfer.token_s(handover.token_s)
        own_s = cost.prefill_s(uncached, cached)
        own_s += handover.externality * self.calls * cost.p1 * uncached
        return handover.ready_s + move_s if handover.price_s + move_s < own_s else None

    def forecast(
        self, demand: Demand, cost: StepCost, claims: int = 0, *, affinity: bool = True
    ) -> Forecast:
        """Return what placing ``demand`` here now would mean under ``cost``.

        Calls that have not started and are due earlier are ahead of it when the engine orders
        them; all are when it does not.

        Args:
            demand: the call.
            cost: the engine's step cost.
            claims: more urgent calls that are waiting for this engine elsewhere.
            affinity: count what the prefix cache saves.
        """
        call = demand.call
        cached = self.prefixes.match(call) if affinity else 0
        uncached = max(call.prompt_tokens - cached, 1)
        ahead, prefill_ahead = self._ahead(demand)
        step = self.token_s(cost)
        own_prefill = cost.prefill_s(uncached, cached)
        queued = self.calls + claims - self.slots
        wait_tokens = self._slot_wait_tokens(queued, ahead, claims) if queued >= 0 else 0.0
        arrives_s = None if demand.handover is None else self.arrives_s(demand, cost, cached)
        if arrives_s is not None:
            wait_s = wait_tokens * step
            return Forecast(
                wait_s=wait_s,
                prefill_s=max(arrives_s - wait_s, 0.0),
                decode_s=demand.output_tokens * step,
                delay_others_s=self._delay_s(0.0, demand, cost),
                uncached_tokens=1,
                arrives_s=arrives_s,
            )
        return Forecast(
            wait_s=wait_tokens * step,
            prefill_s=cost.prefill_s(prefill_ahead) + own_prefill if ahead else own_prefill,
            decode_s=demand.output_tokens * step,
            delay_others_s=self._delay_s(own_prefill, demand, cost),
            uncached_tokens=uncached,
        )

    def _ahead(self, demand: Demand) -> tuple[int, int]:
        """Return the calls that prefill before a new one, and their tokens to prefill."""
        if self.spec.kind is EngineKind.FCFS:
            tokens = self._queued_prefill + self.elsewhere.prefill_tokens
            return len(self._waiting) + (self.elsewhere.prefill_tokens > 0), tokens
        if not self._waiting:
            return 0, 0
        count = tokens = 0
        for entry in self._waiting.values():
            placement = entry.placement
            if placement.due_s <= demand.due_s:
                count += 1
                tokens += placement.uncached_tokens
        return count, tokens

    def _slot_wait_tokens(self, queued: int, ahead: int, claims: int) -> float:
        """Return decode steps until a slot is free for the call after ``ahead`` others."""
        position = min(queued, ahead + claims)
        left = self._soonest_ends()
        rounds, index = divmod(position, max(self.slots, 1))
        mean = (self._left_sum + self.elsewhere.output_tokens) / len(left)
        return left[min(index, len(left) - 1)] + rounds * mean

    def _soonest_ends(self) -> list[int]:
        """Return the output tokens to come of the calls here, fewest first; 0 where none is."""
        if not self._left_sorted:
            self._left_sorted = sorted([*self._left.values(), *self._spread()]) or [0]
        return self._left_sorted

    def _soonest_end(self) -> int:
        """Return the first of :meth:`_soonest_ends`."""
        if not self.calls:
            return 0
        if self._left_least < 0:
            self._left_least = min([*self._left.values(), *self._spread()[:1]])
        return self._left_least

    def _spread(self) -> list[int]:
        """Return output tokens to come of others' calls, fewest first.

        Their sum is known: they count as spread evenly from 0 to twice the mean.
        """
        others = self._elsewhere.calls
        if not others:
            return []
        twice, steps = 2 * self._elsewhere.output_tokens, others * (others + 1)
        return [twice * i // steps for i in range(1, others + 1)]

    def _delay_s(self, own_prefill_s: float, demand: Demand, cost: StepCost) -> float:
        """Return the time the call adds to all others: its prefill stalls them, its row slows."""
        others = self.calls
        decoding = min(others - len(self._waiting), self.slots)
        left = (self._left_sum + self.elsewhere.output_tokens) / max(others, 1)
        row_s = cost.c1 + cost.c2 * demand.call.prompt_tokens
        return own_prefill_s * others + row_s * min(demand.output_tokens, left) * decoding
