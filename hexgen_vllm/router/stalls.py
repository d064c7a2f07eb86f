"""Notices engines that have calls and do nothing: stopped, deadlocked, or cut off.

A connection to such an engine stays open and its health check may even pass, since another
process answers it. What tells is silence: an engine that runs moves all its sequences in every
step. How long a silence may be says :mod:`~hexgen_vllm.policy.liveness`; here is found out how
long it is. Calls of which no sign would be known - no answer has begun, and the engine counts no
steps - tell nothing, and nothing is concluded; nor do answers that their client does not read.
An engine with several data-parallel ranks is stalled when one of them is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.policy.liveness import Silence, borne_s
from hexgen_vllm.policy.load import UNMEASURED
from hexgen_vllm.router.answers import Outcome
from hexgen_vllm.router.attempt import Attempt, Guard
from hexgen_vllm.router.fleet import Engine, Fleet
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.router.targets import worker_of
from hexgen_vllm.types import EngineState


@dataclass(slots=True)
class _Pulse:
    """Signs of life of one target."""

    since_s: float
    steps: int | None = None
    longest_s: float = 0.0
    seen: dict[Attempt, int] = field(default_factory=dict)


class Stalls:
    """Looks at all engines about once a second.

    Args:
        options: limits.
        fleet: is told of engines that stall and revive.
        guard: has the tries under way.
        coordinator: has the loads and rates of engines.
    """

    def __init__(
        self, options: RouterOptions, fleet: Fleet, guard: Guard, coordinator: Coordinator
    ) -> None:
        self._options, self._fleet, self._guard = options, fleet, guard
        self._loads = coordinator.engines
        self._pulses: dict[str, _Pulse] = {}

    def tick(self, now: float) -> None:
        """Find stalled engines, and end the answers that an engine which is down owes."""
        engines = list(self._fleet.engines.values())
        tries: dict[str, list[Attempt]] = {target: [] for e in engines for target in e.targets}
        for attempt in self._guard.attempts:
            if not attempt.client_is_slow():
                tries.setdefault(attempt.target, []).append(attempt)
        for engine in engines:
            for target in engine.targets:
                self._look(engine, target, tries[target], now)
        self._pulses = {n: p for n, p in self._pulses.items() if n in tries}
        self._give_up(tries, now)

    def _look(self, engine: Engine, target: str, tries: list[Attempt], now: float) -> None:
        pulse, steps = self._pulses.setdefault(target, _Pulse(now)), engine.steps.get(target)
        was_idle = not pulse.seen
        moved = any(a.progress > pulse.seen.get(a, 0) for a in tries)
        stepped = steps is not None and steps > (pulse.steps or 0)
        pulse.seen = {a: a.progress for a in tries}
        if steps is not None:
            pulse.steps = steps
        if moved or stepped:
            engine.worked(target, now)
            if not was_idle and target in engine.warm:
                pulse.longest_s = max(pulse.longest_s, now - pulse.since_s)
            self._fleet.revived(engine, target)
        if moved or stepped or was_idle or not tries:
            pulse.since_s = now
            engine.silent.pop(target, None)
            return
        engine.silent[target] = now - pulse.since_s
        if self._is_stalled(engine, target, tries, pulse, now):
            why = f"it has done nothing for {now - pulse.since_s:.0f} s"
            self._fleet.stalled(engine, target, why)

    def _is_stalled(
        self, engine: Engine, target: str, tries: list[Attempt], pulse: _Pulse, now: float
    ) -> bool:
        load = self._loads.get(target)
        if load is None or engine.state is EngineState.DOWN:
            return False
        if target not in engine.steps and not any(a.progress for a in tries):
            return False
        cost = load.cost() or UNMEASURED
        silence = Silence(
            warm=target in engine.warm,
            healthy=engine.failing_since_s is None,
            others=self._fleet.others(engine),
            step_s=load.token_s(cost),
            prefill_s=cost.prefill_s(load.queued_prefill_tokens()),
            longest_s=pulse.longest_s,
        )
        return now - pulse.since_s > borne_s(self._options.patience, silence)

    def _give_up(self, tries: dict[str, list[Attempt]], now: float) -> None:
        limit_s = self._options.lost_stream_timeout_secs
        for target, attempts in tries.items():
            engine = self._fleet.engines.get(worker_of(target))
            if engine is None or not engine.up or target in engine.stalled:
                _end_silent(attempts, limit_s, now)


def _end_silent(attempts: Iterable[Attempt], limit_s: float, now: float) -> None:
    for attempt in attempts:
        if attempt.silent_s(now) > limit_s:
            attempt.abort(Outcome.TIMEOUT)
