"""Placement by marginal cost: what a call adds to every call it meets, late workflows first.

In seconds; the engine with the lowest score gets the call::

    score  = w * min(finish, far) + max(w, 1) * max(finish - far, 0) + x * n * (own + row)

    finish = wait + prefill + (output + FIRST) * step      step: one token at n + 1 calls
    own    = p1 * sum over uncached prefix chunks of tokens / (1 + asked / engines)
    row    = (c1 + c2 * (prompt + output / 2)) * output
    far    = FAR * the earliest finish on any engine
    w      = clip((rho / mean rho) ** c, W_LEAST, W_MOST)
    rho    = (elapsed + mean finish over engines, but for queues + R) / (D - start)

- ``x * n * (own + row)``: seconds that the call adds to the n calls of the engine over its whole
  length. A call of them that ends is followed by another, so all of its length counts. x = 1
  minimises the mean latency; x = 0 sends each call to its own earliest finish, which fills fast
  engines until they are as slow as the others.
- ``own``: a prefix that the fleet asks for often is an investment that its users share: the call
  that brings it to an engine is charged its part of the others' wait. ``asked`` counts the recent
  calls with the chunk, decayed over ``WINDOW`` calls; ``finish`` has the whole prefill.
- A prompt that a prefill engine computes: ``finish`` is by way of that, ``own`` counts there
  (:mod:`hexgen_vllm.policy.disaggregation`).
- ``w``: a workflow that is long against its deadline, compared with the others of now, gets more
  of the fast engines. Only ratios matter, so that deadlines that are loose or hopeless for all
  change nothing. Workflows without deadline weigh 1.
- ``far``: who weighs less waits a little for others. Where one engine is many times as fast as
  another that would be most of its time, for little that the others gain, and nobody knows that
  early how long it gets. So what is beyond ``far`` counts in full.

Needs: measured step costs. Starves: nothing; a workflow weighs at least ``W_LEAST``.
Cost: O(engines * log chunks of the prompt) for bounds of the score, forecasts of those few engines
that can win by theirs, and O(chunks) once per call placed. A held call that is looked at again in a
small fleet: O(engines) and one forecast, as long as no other engine can win.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.policy.calls import Demand, Handover
from hexgen_vllm.policy.dispatch import Choice, Claims, Dispatch, Loads, costs
from hexgen_vllm.policy.engine_load import EngineLoad
from hexgen_vllm.types import Call, StepCost

FIRST: Final = 1.5
"""Steps of a call besides its output tokens: it joins within a step, and hears of the last."""
WINDOW: Final = 1000.0
W_LEAST: Final = 0.2
W_MOST: Final = 5.0
FAR: Final = 3.0
_RHO_WEIGHT: Final = 0.01  # of the newest call in mean rho
_MAX_CHUNKS: Final = 50_000
_MAX_NOTED: Final = 256  # calls, more than are looked at in turn
_MAX_PLACES: Final = 16  # engines of a fleet in which something is kept of a call at each
_LEAST_S: Final = 1e-6
_BELOW: Final = 1.0 - 1e-9  # what a sum may differ by when it is added up in another order


class MarginalCost(Dispatch):
    """See the module.

    Args:
        options: x is ``externality``, c is ``stretch``.
    """

    def __init__(self, options: DispatchOptions) -> None:
        super().__init__(options)
        self.holds = True
        self._asked = AskedPrefixes()
        self._mean_rho = 0.0
        self._rho = 0.0  # of the call chosen for last
        self._clip()

    def retuned(self, options: DispatchOptions) -> None:
        """As of :class:`Dispatch`."""
        super().retuned(options)
        self._asked.forget_places()
        self._clip()

    def _clip(self) -> None:
        """Set between what ratios of rho to its mean a workflow's weight follows it."""
        c = self._options.stretch
        self._least_ratio = W_LEAST ** (1.0 / c) if c else 1.0
        self._most_ratio = W_MOST ** (1.0 / c) if c else 1.0

    def choose(self, demand: Demand, engines: Loads, claims: Claims, now: float) -> Choice:
        """Return the engine with the lowest score.

        Every engine gets a lower bound of its score; those whose bound is above the best score
        found are not forecast. The choice is that of forecasting all.
        """
        if not engines:
            raise ValueError("no engines to choose from")
        call, output, mid = demand.call, demand.output_tokens, demand.output_tokens / 2
        x, affinity = self._options.externality, self._options.prefix_affinity
        prompt, members, known = call.prompt_tokens, list(engines), costs(engines)
        count, steps, total_s, least_s = len(members), output + FIRST, 0.0, math.inf
        shares: dict[int, float] = {}  # prompt tokens that are charged for, by those uncached
        shared_of, shared = -1, 0.0  # the last of them
        for i, engine in enumerate(members):
            cost = known[i]
            cached = engine.prefixes.match(call) if affinity else 0
            waiting = claims.get(engine.engine_id, 0) if claims else 0
            uncached = max(prompt - cached, 1)
            prefill_s = cost.prefill_s(uncached, cached)
            finish_s = engine.least_finish_s(demand, cost, cached, prefill_s, waiting, steps)
            total_s += finish_s
            least_s = min(least_s, finish_s)
            delay_s, others = 0.0, engine.calls
            if others:
                if uncached != shared_of:
                    if uncached not in shares:
                        shares[uncached] = self._asked.shared(call, uncached, count)
                    shared_of, shared = uncached, shares[uncached]
                row_s = (cost.c1 + cost.c2 * (prompt + mid)) * output
                delay_s = x * others * (cost.p1 * shared + row_s)
            engine.finish_s, engine.delay_s = finish_s, delay_s
        if demand.handover is not None:
            self._hand_over(demand, demand.handover, members, known)
        weight, far_s = self._weight(demand, total_s / count, now), FAR * least_s
        first, lowest = 0, math.inf
        for i, engine in enumerate(members):
            bound = _BELOW * (_weighed(engine.finish_s, weight, far_s) + engine.delay_s)
            engine.bound_s = bound
            if bound < lowest:
                first, lowest = i, bound
        best, at = self._scored(demand, members[first], known[first], claims, weight, far_s), first
        for i, engine in enumerate(members):
            if i == first or engine.bound_s > best.score:
                continue
            found = self._scored(demand, engine, known[i], claims, weight, far_s)
            if found.score < best.score or (found.score == best.score and i < at):
                best, at = found, i
        return best

    def stays(
        self, demand: Demand, wanted: EngineLoad, engines: Loads, claims: Claims, now: float
    ) -> bool:
        """As of :class:`Dispatch`: whether no other engine's bound is below the score of this one.

        Score and bounds are those of :meth:`choose`. What of them is the prompt's alone is kept.
        """
        count = len(engines)
        if count > _MAX_PLACES or demand.handover is not None:
            return False
        call, output, mid = demand.call, demand.output_tokens, demand.output_tokens / 2
        asked, x, prompt = self._asked, self._options.externality, call.prompt_tokens
        steps, total_s, least_s = output + FIRST, 0.0, math.inf
        places = asked.places(call, engines)
        own: StepCost | None = None
        for place in places:
            engine = place.engine
            cost, prefixes = engine.cost(), engine.prefixes
            if cost is None or engine.doubted:
                return False
            if place.cost is not cost or place.prefixes is not prefixes or place.changed():
                cached = prefixes.match(call) if self._options.prefix_affinity else 0
                place.renew(call, cost, cached)
            waiting = claims.get(engine.engine_id, 0) if claims else 0
            finish_s = engine.least_finish_s(
                demand, cost, place.cached, place.prefill_s, waiting, steps
            )
            total_s += finish_s
            least_s = min(least_s, finish_s)
            delay_s, others = 0.0, engine.calls
            if others:
                shared = asked.shared_at(place, call, count)
                row_s = (cost.c1 + cost.c2 * (prompt + mid)) * output
                delay_s = x * others * (cost.p1 * shared + row_s)
            engine.finish_s, engine.delay_s = finish_s, delay_s
            if engine is wanted:
                own = cost
        if own is None:
            return False
        weight, far_s = self._weight(demand, total_s / count, now), FAR * least_s
        score = self._scored(demand, wanted, own, claims, weight, far_s).score
        for place in places:
            engine = place.engine
            bound = _BELOW * (_weighed(engine.finish_s, weight, far_s) + engine.delay_s)
            if bound <= score and engine is not wanted:
                return False
        return True

    def _hand_over(
        self, demand: Demand, handover: Handover, engines: list[EngineLoad], known: list[StepCost]
    ) -> None:
        """Set the delays of engines to which the KV of the prompt would come from another."""
        call, output = demand.call, demand.output_tokens
        context = call.prompt_tokens + output / 2
        shared = self._asked.shared(call, handover.uncached_tokens, len(engines))
        for i, engine in enumerate(engines):
            cost = known[i]
            cached = engine.prefixes.match(call) if self._options.prefix_affinity else 0
            if engine.arrives_s(demand, cost, cached) is not None:
                row_s = (cost.c1 + cost.c2 * context) * output
                engine.delay_s = handover.externality * engine.calls * row_s
                engine.delay_s += handover.token_delay_s * shared

    def _scored(
        self,
        demand: Demand,
        engine: EngineLoad,
        cost: StepCost,
        claims: Claims,
        weight: float,
        far_s: float,
    ) -> Choice:
        """Return an engine with its score."""
        waiting, affinity = claims.get(engine.engine_id, 0), self._options.prefix_affinity
        forecast = engine.forecast(demand, cost, waiting, affinity=affinity)
        forecast.finish_in_s += FIRST * engine.token_s(cost)
        score = _weighed(forecast.finish_in_s, weight, far_s) + engine.delay_s
        return Choice(engine, score, "marginal_cost", forecast)

    def placed(self, demand: Demand, choice: Choice, now: float) -> None:
        """Count what was asked for, and how long workflows are against their deadlines."""
        self._asked.add(demand.call)
        if self._rho > 0.0:
            before = self._mean_rho or self._rho
            self._mean_rho = before + _RHO_WEIGHT * (self._rho - before)

    def _weight(self, demand: Demand, finish_s: float, now: float) -> float:
        self._rho = 0.0
        c = self._options.stretch
        # Not the deadline as claimed: what cannot be true must not make a call weigh more.
        deadline_s = demand.due_s + demand.tail_s
        if not c or not math.isfinite(deadline_s):
            return 1.0
        has_s = max(deadline_s - demand.started_s, _LEAST_S)
        needs_s = now - demand.started_s + finish_s + demand.tail_s
        self._rho = rho = max(needs_s, _LEAST_S) / has_s
        mean = self._mean_rho or rho
        # Clipped as a ratio first: a power of what is huge would overflow.
        ratio = min(max(rho / mean, self._least_ratio), self._most_ratio)
        return float(ratio**c)


def _weighed(finish_s: float, weight: float, far_s: float) -> float:
    if weight >= 1.0 or finish_s <= far_s:
        return weight * finish_s
    return weight * far_s + finish_s - far_s


class _Chunk:
    """A prompt chunk: how often it was asked for, as of which call.

    Attributes:
        counted: it was asked for, and is remembered.
        noted: notes of calls that hold it.
    """

    __slots__ = ("at", "count", "counted", "key", "noted")

    def __init__(self, key: int) -> None:
        self.key, self.count, self.at = key, 0.0, 0
        self.counted, self.noted = False, 0


class _Place:
    """A held call at an engine, as of the last look: what stays while rates and prefixes do.

    Attributes:
        engine: which.
        cost, prefixes: its step cost and prefix cache then.
        cached, uncached: tokens of the prompt that it had, and the others.
        prefill_s: seconds of these.
        shared: what :meth:`AskedPrefixes.shared` said of them.
    """

    __slots__ = (
        "as_of", "cached", "changes", "chunk", "cost", "engine", "forgotten", "prefill_s",
        "prefixes", "shared", "uncached",
    )  # fmt: skip

    def __init__(self, engine: EngineLoad) -> None:
        self.engine, self.prefixes = engine, engine.prefixes
        self.cost: StepCost | None = None
        self.cached = self.uncached = self.changes = self.forgotten = 0
        self.prefill_s = self.shared = 0.0
        self.chunk: _Chunk | None = None  # the first that is not cached
        self.as_of = -1

    def changed(self) -> bool:
        """Return whether the engine's prefix cache may hold something else than then."""
        return self.changes < 0 or self.changes != self.prefixes.changes

    def renew(self, call: Call, cost: StepCost, cached: int) -> None:
        """Take the present for that."""
        self.prefixes = prefixes = self.engine.prefixes
        self.cost, self.changes, self.cached = cost, prefixes.changes, cached
        self.uncached = max(call.prompt_tokens - cached, 1)
        self.prefill_s = cost.prefill_s(self.uncached, cached)
        self.as_of = -1


class _Noted:
    """What is known of a call's prompt, found once for all the times that it is looked at."""

    __slots__ = ("chunks", "engines", "places", "prefix")

    def __init__(self, prefix: tuple[int, ...], chunks: list[_Chunk]) -> None:
        self.prefix, self.chunks = prefix, chunks
        self.engines: Loads = ()
        self.places = list[_Place]()


class AskedPrefixes:
    """How often the fleet was lately asked for each prompt chunk, decayed over ``WINDOW`` calls."""

    def __init__(self) -> None:
        self._seen: OrderedDict[int, _Chunk] = OrderedDict()  # counted ones, latest last
        self._noted: dict[str, _Noted] = {}  # by call, oldest first
        self._new: dict[int, _Chunk] = {}  # of them, those that are not counted
        self._calls = self._forgotten = 0

    def add(self, call: Call) -> None:
        """Note that a call with these chunks was placed."""
        self._calls = number = self._calls + 1
        seen = self._seen
        for chunk in self._note(call).chunks:
            key = chunk.key
            if chunk.counted:
                chunk.count = chunk.count * math.exp((chunk.at - number) / WINDOW) + 1.0
                seen.move_to_end(key)
            else:
                chunk.count, chunk.counted = 1.0, True
                seen[key] = chunk
                self._new.pop(key, None)
            chunk.at = number
        self._forget(call.call_id)
        while len(seen) > _MAX_CHUNKS:
            key, chunk = seen.popitem(last=False)
            chunk.count, chunk.counted = 0.0, False
            self._forgotten += 1
            if chunk.noted:
                self._new[key] = chunk

    def shared(self, call: Call, uncached: int, engines: int) -> float:
        """Return the uncached prompt tokens of a call, those of asked-for chunks at their share.

        Args:
            call: whose prompt.
            uncached: tokens that the engine would have to compute.
            engines: among which the chunk's users are spread.
        """
        size, held = call.prefix_chunk_tokens, len(call.prefix)
        if not size or not held:
            return float(uncached)
        chunks = self._note(call).chunks
        tokens = float(call.prompt_tokens - held * size)
        for i in range(max((call.prompt_tokens - uncached) // size, 0), held):
            tokens += size / (1.0 + chunks[i].count / engines)
        return min(tokens, float(uncached))

    def shared_at(self, place: _Place, call: Call, engines: int) -> float:
        """Return :meth:`shared` for what is uncached at a place, found anew only if it changed.

        Who asks for a chunk asks for all before it, so none changes without the first of them.
        """
        if place.as_of < 0:
            size, chunks = call.prefix_chunk_tokens, self._note(call).chunks
            first = max((call.prompt_tokens - place.uncached) // size, 0) if size else len(chunks)
            place.chunk = chunks[first] if first < len(chunks) else None
        at = 0 if place.chunk is None else place.chunk.at
        if place.as_of != at or place.forgotten != self._forgotten:
            place.shared = self.shared(call, place.uncached, engines)
            place.as_of, place.forgotten = at, self._forgotten
        return place.shared

    def places(self, call: Call, engines: Loads) -> list[_Place]:
        """Return what is kept of a call at each of ``engines``."""
        noted = self._note(call)
        if noted.engines is not engines and noted.engines != engines:
            noted.places = [_Place(engine) for engine in engines]
        noted.engines = engines
        return noted.places

    def forget_places(self) -> None:
        """Keep nothing of calls at engines."""
        for noted in self._noted.values():
            noted.engines, noted.places = (), []

    def _note(self, call: Call) -> _Noted:
        """Return what is known of a call's prompt; what chunks count is that of now, always."""
        noted = self._noted.get(call.call_id)
        if noted is not None and noted.prefix is call.prefix:
            return noted
        self._forget(call.call_id)
        chunks = list[_Chunk]()
        for key in call.prefix:
            chunk = self._seen.get(key) or self._new.get(key)
            if chunk is None:
                chunk = self._new[key] = _Chunk(key)
            chunk.noted += 1
            chunks.append(chunk)
        self._noted[call.call_id] = noted = _Noted(call.prefix, chunks)
        if len(self._noted) > _MAX_NOTED:
            self._forget(next(iter(self._noted)))
        return noted

    def _forget(self, call_id: str) -> None:
        noted = self._noted.pop(call_id, None)
        if noted is not None:
            for chunk in noted.chunks:
                chunk.noted -= 1
                if not chunk.noted and not chunk.counted:
                    self._new.pop(chunk.key, None)
