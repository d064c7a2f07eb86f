"""The one state machine behind router and simulator: events and ``now`` in, decisions out.

A driver tells it what happened and carries out what it returns. The router drives it with
asyncio and real time, the simulator with a heap and virtual time.

    call_arrived ──► workflow context ──► demand (length, tail, due) ──► held, in order of due
                                                                          │ room on an engine
      call_prefilled, call_started, call_progressed, call_finished ◄── Placement

Calls wait here, not in the engines, once the engines are full (``hold_depth``): the later a call
is bound to an engine, the better both are known. Baseline policies bind at once.

With more than a few engines, a held call that chose one without room waits for that engine: it is
looked at again when there is room, when engines come, go or change, and with all others at the
first event after :data:`LOOK_S` seconds per engine and call looked at. So an event costs one or two
choices, however many calls wait, and a call that would by now rather go elsewhere hears of it that
much later. With a few engines all are looked at at every event, but a choice is made only for those
that could choose otherwise than before (:meth:`~hexgen_vllm.policy.dispatch.Dispatch.stays`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.policy import overload
from hexgen_vllm.policy.calls import InFlight
from hexgen_vllm.policy.claims import credible_deadline_s
from hexgen_vllm.policy.cost import UNMEASURED
from hexgen_vllm.policy.disaggregation import handover
from hexgen_vllm.policy.dispatch import Choice
from hexgen_vllm.policy.engine_load import Elsewhere, EngineLoad
from hexgen_vllm.policy.engines import Engines
from hexgen_vllm.policy.estimates import Estimates
from hexgen_vllm.policy.exchange import WorkflowPart
from hexgen_vllm.policy.placements import placement
from hexgen_vllm.policy.protection import OpenCall, Protection
from hexgen_vllm.policy.queue import HeldCalls
from hexgen_vllm.policy.shapes import Shapes
from hexgen_vllm.policy.workflow import WorkflowRun
from hexgen_vllm.policy.workflows import Workflows
from hexgen_vllm.types import (
    NO_DEADLINE,
    Call,
    CallResult,
    Decision,
    EngineReport,
    EngineSpec,
    EngineState,
    Placement,
    Rejection,
)

_SCAN: Final = 32  # held calls looked at per event; bounds the cost of one event
LOOK_S: Final = 5e-5
"""Seconds for each engine and call looked at until all held calls are looked at again; looking
takes some percent of that. 0.1 s for 64 engines, 1.6 s for 1,000."""
_FEW: Final = 8 * _SCAN  # engines times calls that are looked at at every event
_LOG: Final = 1024


class Coordinator:
    """Places calls on engines.

    All methods take ``now`` in seconds of one clock that never goes back. Methods that can free
    or add capacity return decisions, which may concern other calls than the one named.

    Args:
        options: the policy and its knobs.
        shapes: learned workflow shapes to start from.
        exhaustive: look at all held calls at every event; for comparison.
    """

    def __init__(
        self, options: DispatchOptions, shapes: Shapes | None = None, *, exhaustive: bool = False
    ) -> None:
        self.options = options
        self._exhaustive = exhaustive
        self._waits_for: dict[str, EngineLoad] = {}  # of held calls, the engine that each chose
        self._waited_for: dict[str, EngineLoad] = {}  # before all were to be looked at again
        self._look_again_s = 0.0
        self._engines = Engines()
        self.engines = self._engines.loads
        self.workflows = Workflows(shapes or Shapes())
        self.log: deque[tuple[float, Decision]] = deque(maxlen=_LOG)
        self._dispatch = placement(options)
        self._holds = self._dispatch.holds and options.hold_depth >= 0
        self._open: dict[str, OpenCall] = {}
        self.open_calls: Mapping[str, OpenCall] = self._open  # for reading
        self._estimates = Estimates(options, self.workflows.shapes, self.engines)
        self._shares = overload.fair_shares(options)
        self._held = HeldCalls(options.background_share, self._shares)
        self._protection = Protection(options, self._estimates, self._held, self._open)

    # Engines

    def engine_joined(
        self, spec: EngineSpec, now: float, state: EngineState = EngineState.READY
    ) -> list[Decision]:
        """Add an engine, or note that one restarted."""
        self._engines.joined(spec, state)
        self.engines[spec.engine_id].fitted_s = now
        self._waits_for.clear()
        return self._release(now)

    def engine_left(self, engine_id: str, now: float) -> list[Decision]:
        """Forget an engine; its driver ends or bounces the calls it had."""
        self._engines.left(engine_id)
        self._waits_for.clear()
        return self._release(now)

    def engine_changed(self, engine_id: str, state: EngineState, now: float) -> list[Decision]:
        """Note that an engine became ready, draining, down, or is on trial."""
        self._engines.changed(engine_id, state)
        self._waits_for.clear()
        return self._release(now)

    def engine_serves(self, engine_id: str, models: frozenset[str], now: float) -> list[Decision]:
        """Note that an engine has other models than before."""
        self._engines.serves(engine_id, models)
        self._waits_for.clear()
        return self._release(now)

    def engine_reported(
        self, engine_id: str, report: EngineReport, now: float | None = None
    ) -> None:
        """Take in telemetry; without ``now`` the age of what was fitted is not kept."""
        self.engines[engine_id].reported(report, now)

    def placed_elsewhere(
        self, source: str, loads: Mapping[str, Elsewhere], now: float
    ) -> list[Decision]:
        """Take in what other coordinators have on the engines.

        Args:
            source: who tells; what it told before no longer counts.
            loads: by engine; one that is missing has nothing.
            now: the time.
        """
        self._engines.told(source, loads)
        return self._release(now)

    def seen_elsewhere(self, part: WorkflowPart, now: float) -> None:
        """Take in what another coordinator knows of a workflow: it may go on here."""
        self.workflows.heard(part, now)
        engine = self.engines.get(part.engine)
        if engine is not None and part.prefix:
            engine.prefixes.put(part.prefix, part.chunk_tokens)

    def retune(self, options: DispatchOptions, now: float) -> list[Decision]:
        """Turn the knobs of the policy in force; ``options`` differ in nothing else."""
        self.options = options
        self._dispatch.retuned(options)
        self._estimates.retuned(options)
        self._waits_for.clear()
        return self._release(now)

    # Calls

    def call_arrived(self, call: Call, now: float) -> list[Decision]:
        """Take in a call; an empty answer means that it is held."""
        entry = self._opened(call, now)
        if self._protection.turns_away(entry):
            return [self._refused(entry, overload.unattainable(call.call_id), now)]
        if not self.workflows.admit(entry.run, self.options.max_workflows):
            return [self._refused(entry, overload.crowded(call.call_id), now)]
        if self._holds and (placement := self._at_once(entry, now)) is not None:
            return [placement]
        if not self._holds or not (self._candidates(entry) or self._reachable(entry)):
            return [self._settled(entry, now)]
        self._protection.hold(entry, now)
        return [*self._release(now), *self._bounded(now)]

    def call_started(self, call_id: str, now: float) -> None:
        """Note the first token of a call."""
        entry = self._in_flight(call_id)
        if entry is not None and not entry[1].started:
            entry[1].first_token_s = now
            entry[1].output_tokens = max(entry[1].output_tokens, 1)
            entry[0].started(entry[1])

    def call_progressed(self, call_id: str, output_tokens: int, now: float) -> None:
        """Note that a call has ``output_tokens`` tokens so far; its expectation is refined."""
        found = self._in_flight(call_id)
        if found is None:
            return
        self.call_started(call_id, now)
        flight = found[1]
        flight.output_tokens = output_tokens
        if output_tokens >= flight.expected_tokens:
            flight.longer = self._estimates.output_tokens(flight.call, seen=output_tokens)
        found[0].progressed(flight)

    def call_prefilled(self, call_id: str, result: CallResult, now: float) -> list[Decision]:
        """Note that a prefill engine is done with the prompt of a call.

        If it was not ``ok``, the engine that the call is placed on computes the prompt itself.
        """
        entry = self._open.get(call_id)
        if entry is None or entry.engine is None or entry.prefiller is None:
            return []
        prefiller, entry.prefiller = entry.prefiller, None
        half, flight = prefiller.removed(call_id), entry.engine.in_flight.get(call_id)
        if half is not None and result.ok:
            prefiller.learn(half, result, now)
        if flight is not None and result.ok:
            flight.moved_s = now
        elif flight is not None:
            entry.engine.takes_prompt(flight)
        return self._release(now)

    def call_bounced(self, call_id: str, now: float) -> list[Decision]:
        """Place a call elsewhere: its engine failed, and another one is to answer it or go on.

        The engine that failed is the one that computes its prompt, if one does that now.
        """
        entry = self._open.get(call_id)
        if entry is None or entry.engine is None:
            return []
        flight = entry.engine.removed(call_id)
        failed = frozenset(((entry.prefiller or entry.engine).engine_id,))
        if entry.prefiller is not None:
            entry.prefiller.removed(call_id)
            entry.prefiller = None
        if flight is not None and flight.started:
            entry.moved, entry.refused_by = True, failed  # others may be back since they failed
        else:
            entry.refused_by |= failed
        entry.engine = None
        return [self._settled(entry, now), *self._release(now)]

    def call_finished(self, call_id: str, result: CallResult, now: float) -> list[Decision]:
        """Note that a call ended, well or not; also for one still held."""
        entry = self._open.pop(call_id, None)
        if entry is None:
            return []
        self._held.discard(call_id)
        self._waits_for.pop(call_id, None)
        if entry.engine is not None:
            flight = entry.engine.removed(call_id)
            if entry.prefiller is not None:
                entry.prefiller.removed(call_id)
            self._settle(entry, result)
            if flight is not None and result.ok and not entry.moved:
                entry.engine.learn(flight, result, now)
        self.workflows.ended(entry.demand.call, result, now)
        return self._release(now)

    def workflow_finished(self, workflow_id: str) -> None:
        """Note the client's word that a workflow is over."""
        self.workflows.finished(workflow_id)

    def tick(self, now: float) -> list[Decision]:
        """Do what time alone causes; call about once a second."""
        self.workflows.expire(now)
        self._engines.presume(now)
        decisions = self._release(now)
        for call_id in self._protection.expired(now):
            rejection = overload.expired(call_id, self.options.held_timeout_s)
            decisions.append(self._refused(self._open[call_id], rejection, now))
        return decisions

    @property
    def held(self) -> int:
        """Calls waiting here for room on an engine."""
        return len(self._held)

    def in_flight(self, call_id: str) -> InFlight | None:
        """Return a placed call's accounting."""
        found = self._in_flight(call_id)
        return None if found is None else found[1]

    # Placement

    def _candidates(self, entry: OpenCall) -> list[EngineLoad]:
        return self._engines.candidates(entry.demand.call, entry.refused_by)

    def _reachable(self, entry: OpenCall) -> list[EngineLoad]:
        return self._engines.reachable(entry.demand.call, entry.refused_by)

    def _opened(self, call: Call, now: float) -> OpenCall:
        """Take a call into its workflow."""
        run, seen = self.workflows.arrived(call, now)
        self._order(run, call, seen.ordinal, now)
        entry = OpenCall(self._estimates.demand(call, run, seen.ordinal), run)
        self._open[call.call_id] = entry
        self._protection.judge(entry, seen.ordinal, now)
        return entry

    def _order(self, run: WorkflowRun, call: Call, ordinal: int, now: float) -> None:
        """Set the deadline of a workflow, and the one that orders it, after a call of it came."""
        default_s = run.started_s + self.options.default_deadline_s
        if run.deadline_s == NO_DEADLINE:
            run.deadline_s = default_s
        if call.deadline_s != NO_DEADLINE:
            least_s = self._estimates.least_s(call, ordinal, now)
            run.asked_s = now
            run.ordered_by_s = credible_deadline_s(
                call.deadline_s, run.ordered_by_s, default_s, now + least_s
            )
        elif run.ordered_by_s == NO_DEADLINE:
            run.ordered_by_s = run.deadline_s

    def _release(self, now: float) -> list[Decision]:
        """Place held calls, most urgent first, while engines have room.

        A call may prefer an engine that has no room yet: it then stays, and claims a place there,
        so that calls behind it see the queue.
        """
        decisions: list[Decision] = []
        if not self._held or not self._any_room():
            return decisions
        first = self._held.first(_SCAN, now=now)
        demoted = self._protection.judge_held(first, now)
        self._forget_stale(now)
        depth, claims, held_back = self.options.hold_depth, dict[str, int](), set[str]()
        models = self._engines.with_room(self._held.models, self.options.hold_depth)
        if demoted or models is not None:
            first = self._held.first(_SCAN, models, now=now)
        for call_id in first:
            wanted = self._waits_for.get(call_id)
            if wanted is not None and not wanted.room(depth):
                claims[wanted.engine_id] = claims.get(wanted.engine_id, 0) + 1
                continue
            entry = self._open[call_id]
            if entry.run.background and entry.demand.call.model in held_back:
                continue
            candidates = self._candidates(entry)
            if not candidates:
                if not self._reachable(entry):
                    decisions.append(self._refused(entry, overload.no_endpoints(call_id), now))
                continue
            if self._protection.holds_back(entry, candidates):
                held_back.add(entry.demand.call.model)
                continue
            wanted = self._waited_for.get(call_id)
            if wanted is not None and self._stays(entry, wanted, candidates, claims, now):
                self._waits_for[call_id] = wanted
                claims[wanted.engine_id] = claims.get(wanted.engine_id, 0) + 1
                continue
            choice = self._chosen(entry, candidates, claims, now)
            if not choice.engine.room(depth):
                self._waits_for[call_id] = choice.engine
                claims[choice.engine.engine_id] = claims.get(choice.engine.engine_id, 0) + 1
                continue
            self._waits_for.pop(call_id, None)
            self._held.placed(call_id)
            decisions.append(self._placed(entry, choice, now))
            if not self._any_room():
                break
        return decisions

    def _forget_stale(self, now: float) -> None:
        """Have all held calls looked at again, if it is time."""
        looked_at = min(len(self._held), _SCAN) * len(self.engines)
        if self._exhaustive or looked_at <= _FEW or now >= self._look_again_s:
            self._waited_for, self._waits_for = self._waits_for, {}
            self._look_again_s = now + LOOK_S * looked_at

    def _stays(
        self,
        entry: OpenCall,
        wanted: EngineLoad,
        candidates: Sequence[EngineLoad],
        claims: Mapping[str, int],
        now: float,
    ) -> bool:
        """Return whether a held call is sure to choose the engine again that it waited for."""
        demand = entry.demand
        if self._exhaustive or wanted.room(self.options.hold_depth):
            return False
        if self._engines.prefillers(demand.call, entry.refused_by):
            return False
        demand.handover = None
        return self._dispatch.stays(demand, wanted, candidates, claims, now)

    def _at_once(self, entry: OpenCall, now: float) -> Placement | None:
        """Place a call that has nobody to wait behind, as holding and releasing it would."""
        if self._held or entry.run.background:
            return None
        candidates = self._candidates(entry)
        if not candidates or not self._any_room():
            return None
        choice = self._chosen(entry, candidates, {}, now)
        if not choice.engine.room(self.options.hold_depth):
            return None
        if self._shares is not None:
            tenant = entry.demand.call.tenant
            self._shares.waits(tenant, ())
            self._shares.served(tenant, entry.demand.tokens)
        return self._placed(entry, choice, now)

    def _bounded(self, now: float) -> list[Decision]:
        """Refuse held calls until the queue is within its bounds."""
        decisions: list[Decision] = []
        while (call_id := self._protection.excess()) is not None:
            decisions.append(self._refused(self._open[call_id], overload.saturated(call_id), now))
        return decisions

    def _settled(self, entry: OpenCall, now: float) -> Decision:
        """Place a call at once, or refuse it when nobody can take it."""
        candidates = self._candidates(entry) or self._reachable(entry)
        if not candidates:
            return self._refused(entry, overload.no_endpoints(entry.demand.call.call_id), now)
        return self._placed(entry, self._chosen(entry, candidates, {}, now), now)

    def _chosen(
        self,
        entry: OpenCall,
        candidates: Sequence[EngineLoad],
        claims: Mapping[str, int],
        now: float,
    ) -> Choice:
        demand = entry.demand
        prefillers = self._engines.prefillers(demand.call, entry.refused_by)
        demand.handover = handover(demand, prefillers, self.options) if prefillers else None
        return self._dispatch.choose(demand, candidates, claims, now)

    def _any_room(self) -> bool:
        return self._engines.any_room(self.options.hold_depth)

    def _placed(self, entry: OpenCall, choice: Choice, now: float) -> Placement:
        demand, engine, forecast = entry.demand, choice.engine, choice.forecast
        cached = engine.prefixes.match(demand.call)
        decode_s = self._estimates.own_s(demand) if forecast is None else forecast.decode_s
        prefill = self._prefill(entry, choice, cached, decode_s, now)
        uncached = max(demand.call.prompt_tokens - cached, 1)
        placement = Placement(
            call_id=demand.call.call_id,
            engine_id=engine.engine_id,
            reason=choice.reason,
            score=choice.score,
            finish_s=None if forecast is None else now + forecast.finish_in_s,
            due_s=demand.due_s,
            deadline_s=demand.deadline_s,
            tail_s=demand.tail_s,
            expected_output_tokens=demand.output_tokens,
            uncached_tokens=uncached if prefill is None else 1,
            background=entry.run.background,
            priority_key=self._priority_key(entry),
            decode_s=decode_s,
            prefill=prefill,
        )
        self._dispatch.placed(demand, choice, now)
        entry.run.begun = True
        self.workflows.placed(entry.run, demand.call, engine.engine_id)
        flight = InFlight(demand.call, placement, now, batch=engine.calls + 1)
        if not demand.call.streamed:
            flight.starts_s = now + choice.first_token_in_s(demand)
        if prefill is not None:
            flight.moved_tokens = uncached
            entry.prefiller = prefiller = self.engines[prefill.engine_id]
            half = InFlight(demand.call, prefill, now, batch=prefiller.calls + 1)
            prefiller.placed(half)
        engine.placed(flight)
        entry.engine = engine
        self.log.append((now, placement))
        return placement

    def _prefill(
        self, entry: OpenCall, choice: Choice, cached: int, decode_s: float, now: float
    ) -> Placement | None:
        """Return where the prompt of a call is computed, ``None`` if by the engine chosen."""
        demand, engine, forecast = entry.demand, choice.engine, choice.forecast
        found = demand.handover
        if found is None:
            return None
        if forecast is not None:
            arrives_s = forecast.arrives_s
        else:
            arrives_s = engine.arrives_s(demand, engine.cost() or UNMEASURED, cached)
        if arrives_s is None:
            return None
        after_s = arrives_s - found.ready_s + decode_s
        return Placement(
            call_id=demand.call.call_id,
            engine_id=found.engine_id,
            reason="prefill",
            score=found.price_s,
            finish_s=now + found.ready_s,
            due_s=demand.due_s - after_s,
            deadline_s=demand.deadline_s,
            tail_s=demand.tail_s + after_s,
            expected_output_tokens=1,
            uncached_tokens=found.uncached_tokens,
            background=entry.run.background,
            priority_key=self._priority_key(entry),
        )

    def _settle(self, entry: OpenCall, result: CallResult) -> None:
        """Charge a tenant what its call took beyond what was expected, or give back the rest."""
        if self._shares is None or not result.ok or result.output_tokens is None:
            return
        demand = entry.demand
        took = (result.prompt_tokens or demand.call.prompt_tokens) + result.output_tokens
        self._shares.settled(demand.call.tenant, took - demand.tokens)

    def _priority_key(self, entry: OpenCall) -> float | None:
        """Return what an engine that takes one number orders the call by, if not by due time."""
        if self.options.priority_by == "attained":  # PLAS (Autellix, arXiv 2502.13965)
            return entry.run.attained
        if self.options.priority_by == "remaining":  # SRPT by what was learned
            return self._estimates.work_s(entry.demand)
        return None

    def _refused(self, entry: OpenCall, rejection: Rejection, now: float) -> Rejection:
        call = entry.demand.call
        self._held.discard(call.call_id)
        self._waits_for.pop(call.call_id, None)
        del self._open[call.call_id]
        self.workflows.ended(call, CallResult(ok=False, reason=rejection.reason), now)
        self.log.append((now, rejection))
        return rejection

    def _in_flight(self, call_id: str) -> tuple[EngineLoad, InFlight] | None:
        entry = self._open.get(call_id)
        if entry is None or entry.engine is None:
            return None
        return entry.engine, entry.engine.in_flight[call_id]
