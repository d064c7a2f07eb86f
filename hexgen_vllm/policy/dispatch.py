"""Placement: which engine gets a call.

Every policy answers the same question, :meth:`Dispatch.choose`, over engines that can serve the
call, given in order of their name, so that ties break the same way everywhere.

| name | score, best first | needs | starves |
|---|---|---|---|
| ``round_robin`` | turn | nothing | nothing |
| ``least_outstanding`` | fewest calls in flight | nothing | nothing |
| ``paper`` | the paper's blend of speed fit and assigned work | solo times | the slow at alpha 1 |
| ``earliest_finish`` | earliest predicted finish plus delay caused to others | rates | nothing |
| ``slack`` | :mod:`hexgen_vllm.policy.marginal_cost` | rates | nothing |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Final

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.policy.calls import Demand, Forecast
from hexgen_vllm.policy.cost import UNMEASURED, trusted_cost
from hexgen_vllm.policy.engine_load import EngineLoad
from hexgen_vllm.types import StepCost

Loads = Sequence[EngineLoad]
"""Engines that can serve a call, not empty, sorted by name."""
Claims = Mapping[str, int]
"""Per engine, more urgent calls that wait for it outside."""
OPTIMISM: Final = 0.9
_DELAY_WEIGHT: Final = 0.12


@dataclass(init=False, slots=True)
class Choice:
    """The engine chosen, why, and what is expected there."""

    engine: EngineLoad
    score: float
    reason: str
    forecast: Forecast | None

    def __init__(
        self, engine: EngineLoad, score: float, reason: str, forecast: Forecast | None = None
    ) -> None:
        self.engine, self.score, self.reason = engine, score, reason
        self.forecast = forecast

    def first_token_in_s(self, demand: Demand) -> float:
        """Return the predicted seconds until the first token of ``demand``."""
        cost = self.engine.cost() or UNMEASURED
        forecast = self.forecast or self.engine.forecast(demand, cost)
        return forecast.wait_s + forecast.prefill_s


class Dispatch:
    """A placement policy. It may keep counters; it never reads a clock.

    Args:
        options: its knobs.

    The coordinator calls :meth:`choose`, several times for a call that finds no room, and
    :meth:`placed` once when the call is sent.

    Attributes:
        holds: calls wait outside while engines are full, so that they are placed when more is
            known; otherwise each is placed when it comes.
    """

    holds: bool = False

    def __init__(self, options: DispatchOptions) -> None:
        self._options = options

    def choose(self, demand: Demand, engines: Loads, claims: Claims, now: float) -> Choice:
        """Return the engine for ``demand``.

        Args:
            demand: the call and its estimates.
            engines: those that can serve it.
            claims: how many wait for each; may be ignored.
            now: the present moment, for slack.
        """
        raise NotImplementedError

    def stays(
        self, demand: Demand, wanted: EngineLoad, engines: Loads, claims: Claims, now: float
    ) -> bool:
        """Return whether :meth:`choose` is sure to say ``wanted``, as it did before.

        For calls that are looked at again and again while they wait; ``False`` where to find out
        takes as long as to choose.
        """
        return False

    def placed(self, demand: Demand, choice: Choice, now: float) -> None:
        """Note that a call was sent where :meth:`choose` said last."""

    def retuned(self, options: DispatchOptions) -> None:
        """Take other knobs from now on; what was learned stays."""
        self._options = options


def assumed_cost(engines: Sequence[EngineLoad]) -> StepCost:
    """Return what an unmeasured engine is taken for: a little faster than the measured ones.

    The optimism matters: at the mean exactly, ties could keep an engine unmeasured forever.
    """
    known = [c for e in engines if not e.doubted and (c := e.cost()) is not None]
    if not known:
        return UNMEASURED
    n = len(known) / OPTIMISM
    return StepCost(*(sum(getattr(c, f.name) for c in known) / n for f in fields(StepCost)))


def costs(engines: Sequence[EngineLoad]) -> list[StepCost]:
    """Return what each engine's steps cost, as measured so far as that is trusted, else as assumed.

    Assumed is :func:`assumed_cost`: from the engines whose rates are trusted, else nominal.
    """
    found = []
    for engine in engines:
        cost = engine.cost()
        if cost is None or engine.doubted:
            assumed = assumed_cost(engines)
            return [_cost_or(e, assumed) for e in engines]
        found.append(cost)
    return found


def _cost_or(engine: EngineLoad, assumed: StepCost) -> StepCost:
    cost = engine.cost()
    if cost is None:
        return assumed
    return trusted_cost(cost, engine.error, assumed) if engine.doubted else cost


class RoundRobin(Dispatch):
    """Engines in turn, as a plain load balancer does."""

    def __init__(self, options: DispatchOptions) -> None:
        super().__init__(options)
        self._turn = 0

    def choose(self, demand: Demand, engines: Loads, claims: Claims, now: float) -> Choice:
        """Return the next engine."""
        engine = engines[self._turn % len(engines)]
        self._turn += 1
        return Choice(engine, 0.0, "turn")


class LeastOutstanding(Dispatch):
    """The engine with the fewest calls in flight, as most routers do.

    Ties go round, so that idle engines share the first calls.
    """

    def __init__(self, options: DispatchOptions) -> None:
        super().__init__(options)
        self._turn = 0

    def choose(self, demand: Demand, engines: Loads, claims: Claims, now: float) -> Choice:
        """Return the least loaded engine by call count."""
        least = min(len(e.in_flight) for e in engines)
        level = [e for e in engines if len(e.in_flight) == least]
        self._turn += 1
        return Choice(level[self._turn % len(level)], -float(least), "fewest_calls")


class PaperScore(Dispatch):
    """The dispatcher of HEXGEN-TEXT2SQL (arXiv 2505.05286).

    Form ``code`` (the public simulator, base = the first engine)::

        score(e) = alpha * T_base / T_e - (1 - alpha) * W_e / W_base

    with T_e the call's time alone on e and W_e all service seconds ever assigned to e; W never
    falls. Form ``paper``::

        score(e) = (1 - alpha) * beta / t_queue(e) - alpha * T_e

    with t_queue(e) the calls in flight there times T_e of this one. Both ignore batching and the
    prefix cache, as published. Engines without measured rates are taken for average.
    """

    def choose(self, demand: Demand, engines: Loads, claims: Claims, now: float) -> Choice:
        """Return the engine with the highest score."""
        solo = [e.solo_s(demand, c) for e, c in zip(engines, costs(engines), strict=True)]
        score = self._paper if self._options.paper_form == "paper" else self._code
        scores = score(solo, engines)
        best = max(range(len(engines)), key=lambda i: (scores[i], -i))
        engines[best].assigned_s += solo[best]
        return Choice(engines[best], scores[best], "paper_score")

    def _code(self, solo: list[float], engines: Sequence[EngineLoad]) -> list[float]:
        alpha, base = self._options.alpha, engines[0]
        if base.assigned_s <= 0:  # as published, the first call goes to the base engine
            return [-float(i) for i in range(len(engines))]
        return [
            alpha * solo[0] / t - (1 - alpha) * e.assigned_s / base.assigned_s
            for t, e in zip(solo, engines, strict=True)
        ]

    def _paper(self, solo: list[float], engines: Sequence[EngineLoad]) -> list[float]:
        alpha, beta = self._options.alpha, self._options.beta
        return [
            (1 - alpha) * beta / max(len(e.in_flight) * t, 1e-3) - alpha * t
            for t, e in zip(solo, engines, strict=True)
        ]


class EarliestFinish(Dispatch):
    """Ours: smallest predicted finish plus the delay the call causes to others.

    In seconds; lower is better::

        score = finish + 0.12 * delay_others + max(0, now + finish - due)

    Uncached prefill, slots, batch interference and measured rates are all in the forecast, so
    affinity to a prefix is worth exactly the seconds of prefill it saves. The last term gives the
    fast devices to calls that need them: one with slack to spare is judged more by the delay it
    causes, one that would be late more by its own finish (just-enough choice, GoodServe, arXiv
    2605.16867).
    """

    def __init__(self, options: DispatchOptions) -> None:
        super().__init__(options)
        self.holds = True

    def choose(self, demand: Demand, engines: Loads, claims: Claims, now: float) -> Choice:
        """Return the engine with the lowest score."""
        best: Choice | None = None
        for engine, cost in zip(engines, costs(engines), strict=True):
            waiting = claims.get(engine.engine_id, 0)
            forecast = engine.forecast(
                demand, cost, waiting, affinity=self._options.prefix_affinity
            )
            finish_s = forecast.finish_in_s
            score = finish_s + _DELAY_WEIGHT * forecast.delay_others_s
            score += max(0.0, now + finish_s - demand.due_s)
            if best is None or score < best.score:
                best = Choice(engine, score, "finish", forecast)
        if best is None:
            raise ValueError("no engines to choose from")
        return best
