"""Notices engines that have calls and do nothing: stopped, deadlocked, or cut off.

A connection to such an engine stays open and its health check may even pass, since another
process answers it. What tells is silence: an engine that runs moves all its sequences in every
step. So an engine is stalled when, for

    engine_stall_secs + engine_stall_steps * (step) + 2 * (prefill queued there)

with the predicted times of its step and of its queued prompts, none of its answers grew and its
step count stood still. Calls of which neither would be known - no answer has begun, and it counts
no steps - tell nothing, and nothing is concluded; nor do answers that their client does not read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.policy.dispatch import UNMEASURED
from hexgen_vllm.policy.load import EngineLoad
from hexgen_vllm.router.attempt import TIMEOUT, Attempt, Guard
from hexgen_vllm.router.fleet import Engine, Fleet
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.types import EngineState


@dataclass(slots=True)
class _Pulse:
    """Signs of life of one engine."""

    since_s: float
    steps: int | None = None
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
        tries: dict[str, list[Attempt]] = {name: [] for name in self._fleet.engines}
        for attempt in self._guard.attempts:
            if not attempt.client_is_slow():
                tries.setdefault(attempt.engine, []).append(attempt)
        for name, engine in list(self._fleet.engines.items()):
            self._look(engine, tries[name], now)
        self._pulses = {n: p for n, p in self._pulses.items() if n in tries}
        self._give_up(tries, now)

    def _look(self, engine: Engine, tries: list[Attempt], now: float) -> None:
        pulse = self._pulses.setdefault(engine.name, _Pulse(now))
        was_idle = not pulse.seen
        moved = any(a.progress > pulse.seen.get(a, 0) for a in tries)
        stepped = engine.steps is not None and engine.steps != pulse.steps
        pulse.seen = {a: a.progress for a in tries}
        pulse.steps = engine.steps
        if moved or stepped:
            self._fleet.revived(engine)
        if moved or stepped or was_idle or not tries:
            pulse.since_s = now
        elif self._is_stalled(engine, tries, now - pulse.since_s):
            self._fleet.stalled(engine, f"it has done nothing for {now - pulse.since_s:.0f} s")

    def _is_stalled(self, engine: Engine, tries: list[Attempt], silent_s: float) -> bool:
        least_s, load = self._options.engine_stall_secs, self._loads.get(engine.name)
        if not least_s or load is None or engine.state is EngineState.DOWN:
            return False
        if engine.steps is None and not any(a.progress for a in tries):
            return False
        return silent_s > least_s + self._work_s(load)

    def _work_s(self, load: EngineLoad) -> float:
        """Return how long the engine may be silent at work, by its rates."""
        cost = load.cost() or UNMEASURED
        step_s = self._options.engine_stall_steps * load.token_s(cost)
        return step_s + 2.0 * cost.prefill_s(load.queued_prefill_tokens())

    def _give_up(self, tries: dict[str, list[Attempt]], now: float) -> None:
        limit_s = self._options.lost_stream_timeout_secs
        for name, attempts in tries.items():
            engine = self._fleet.engines.get(name)
            if engine is None or not engine.up or engine.stalled:
                _end_silent(attempts, limit_s, now)


def _end_silent(attempts: Iterable[Attempt], limit_s: float, now: float) -> None:
    for attempt in attempts:
        if attempt.silent_s(now) > limit_s:
            attempt.abort(TIMEOUT)
