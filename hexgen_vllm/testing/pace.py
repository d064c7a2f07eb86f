"""Scheduler classes that make an engine slower: only for demos and tests on one machine.

Several engines of clearly and steadily different speed cannot be had from cores of one small
machine; they disturb each other. A paced engine sleeps at the end of each step until the step has
taken as long as it would on the slower device. It computes the same tokens. Nothing else reads
``hexgen_pace``: :class:`hexgen_vllm.UrgencyScheduler` ignores it.

    --scheduler-cls hexgen_vllm.testing.pace.PacedUrgencyScheduler
    --additional-config '{"hexgen_pace": {"prefill_tokens_per_s": 4000, "step_ms": 16}}'
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from hexgen_vllm.engine.compat import LikeStock
from hexgen_vllm.engine.scheduler import UrgencyScheduler
from hexgen_vllm.engine.telemetry import step_shape
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.option import check, from_mapping, option


@dataclass(frozen=True)
class DeviceSpeed:
    """Speed of the emulated device (``additional_config["hexgen_pace"]``)."""

    prefill_tokens_per_s: float = option(8000.0, "prompt tokens computed per second", least=1.0)
    step_ms: float = option(8.0, "milliseconds that every step takes", least=0.0)
    per_sequence_ms: float = option(0.0, "milliseconds more for each decoding call", least=0.0)

    def __post_init__(self) -> None:
        check(self)

    def step_s(self, n_decode: int, n_prefill: int) -> float:
        """Return the seconds of one step."""
        decode_s = (self.step_ms + self.per_sequence_ms * n_decode) / 1000
        return decode_s + n_prefill / self.prefill_tokens_per_s


def pace_of(vllm_config: Any) -> DeviceSpeed:
    """Read ``additional_config["hexgen_pace"]``.

    Raises:
        ConfigError: it is not an object, or a value is unknown or out of bounds.
    """
    extra = getattr(vllm_config, "additional_config", None)
    values = extra.get("hexgen_pace", {}) if isinstance(extra, dict) else {}
    if not isinstance(values, dict):
        raise ConfigError(f"additional_config.hexgen_pace must be an object, not {values!r}.")
    return from_mapping(DeviceSpeed, values, where="hexgen_pace option")


class PaceMixin(LikeStock):
    """Sleeps in ``update_from_output``; put it before the scheduler class to slow down."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pace = pace_of(self.vllm_config)
        self._paced: deque[tuple[Any, float]] = deque()
        self._paced_until_s = 0.0

    def schedule(self, throttle_prefills: bool = False) -> Any:
        """Schedule a step and note when it began.

        With calls in the batch it began when the last one ended: what this small machine does
        between steps is not part of the emulated device, as long as it fits into the step.
        """
        began_s = self._paced_until_s if self.running else time.monotonic()
        output = super().schedule(throttle_prefills)
        self._paced.append((output, began_s))
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Sleep for what the emulated device would need longer, then take in the output."""
        began_s = self._began_s(scheduler_output)
        if scheduler_output.total_num_scheduled_tokens:
            shape = step_shape(scheduler_output)
            due_s = max(began_s, self._paced_until_s) + self._pace.step_s(
                shape.n_decode, shape.n_prefill
            )
            time.sleep(max(due_s - time.monotonic(), 0.0))
            self._paced_until_s = time.monotonic()
        return super().update_from_output(scheduler_output, model_runner_output)

    def _began_s(self, output: Any) -> float:
        while self._paced:
            first, began_s = self._paced.popleft()
            if first is output:
                return began_s
        return time.monotonic()


class PacedScheduler(PaceMixin):
    """Stock order of calls on a slower device."""


class PacedUrgencyScheduler(PaceMixin, UrgencyScheduler):
    """Order by urgency on a slower device."""
