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
  calls with the chunk (:mod:`hexgen_vllm.policy.asked_prefixes`); ``finish`` has the whole prefill.
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
from typing import Final

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.policy.asked_prefixes import AskedPrefixes
from hexgen_vllm.policy.calls import Demand, Handover
from hexgen_vllm.policy.dispatch import Choice, Claims, Dispatch, Loads, costs
from hexgen_vllm.policy.engine_load import EngineLoad
from hexgen_vllm.types import StepCost

FIRST: Final = 1.5
"""Steps of a call besides its output tokens: it joins within a step, and hears of the last."""
W_LEAST: Final = 0.2
W_MOST: Final = 5.0
FAR: Final = 3.0
_RHO_WEIGHT: Final = 0.01  # of the newest call in mean rho
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
        self._asked.forget_calls()
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
        places = asked.at_engines(call, engines)
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
