"""A step cost in the seven coefficients of vllm-router's program scheduling, and back.

vllm-router calibrates one model for a whole fleet; here every device has its own. It knows two
formulas, in seconds, tokens n counted in thousands::

    prefill(n)       = intercept + linear * n + quadratic * n^2
    decode step(b,c) = fixed + batch * b + context * c

A :class:`~hexgen_vllm.types.StepCost` says the same with a prompt computed in one step, so both
directions are exact. ``decode_throughput_alpha``, the share of decode throughput that is left
while a prompt is computed, follows from the rest; it is written and not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.types import StepCost

PREFILL: Final = "prefill_cost_model"
DECODE: Final = "decode_throughput_model"
_PREFILL_KEYS: Final = (
    "intercept_seconds",
    "linear_seconds_per_1k_tokens",
    "quadratic_seconds_per_1k_tokens_squared",
)
_ALPHA: Final = "decode_throughput_alpha"
_DECODE_KEYS: Final = (
    "fixed_step_seconds",
    "batch_step_seconds_per_request",
    "context_step_seconds_per_token",
)
_TYPICAL_BATCH: Final = 16
_TYPICAL_CONTEXT: Final = 4096


def to_calibration(cost: StepCost, chunk: int = 2048) -> dict[str, dict[str, float]]:
    """Return ``cost`` under vllm-router's names.

    Args:
        cost: of one device.
        chunk: prompt tokens of a step, for ``decode_throughput_alpha`` only.
    """
    context = _TYPICAL_BATCH * _TYPICAL_CONTEXT
    alone = cost.step_s(_TYPICAL_BATCH, context)
    mixed = cost.step_s(_TYPICAL_BATCH, context, chunk, chunk * chunk / 2)
    prefill = (cost.c0 + cost.p0, 1e3 * cost.p1, 1e6 * cost.p2 / 2)
    return {
        PREFILL: {
            **dict(zip(_PREFILL_KEYS, prefill, strict=True)),
            _ALPHA: alone / mixed if mixed > 0 else 1.0,
        },
        DECODE: dict(zip(_DECODE_KEYS, (cost.c0, cost.c1, cost.c2), strict=True)),
    }


def from_calibration(values: Mapping[str, Any]) -> StepCost:
    """Return the step cost that vllm-router's calibration says; other keys are ignored.

    Raises:
        ConfigError: a model or a coefficient is missing, or is not a number of at least 0.
    """
    intercept, linear, quadratic = _numbers(values, PREFILL, _PREFILL_KEYS)
    c0, c1, c2 = _numbers(values, DECODE, _DECODE_KEYS)
    if not c0 + c1 > 0:
        raise ConfigError(f"{DECODE} must say that a step takes time.")
    return StepCost(c0, c1, c2, max(intercept - c0, 0.0), linear / 1e3, 2 * quadratic / 1e6)


def _numbers(values: Mapping[str, Any], model: str, keys: tuple[str, ...]) -> list[float]:
    given = values.get(model)
    if not isinstance(given, Mapping):
        raise ConfigError(f"{model} must be an object with {', '.join(keys)}.")
    return [_number(given.get(key), f"{model}.{key}") for key in keys]


def _number(value: object, name: str) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or value < 0:  # type: ignore[arg-type, operator]
        raise ConfigError(f"{name} must be a number of seconds, 0 or more, not {value!r}.")
    return float(value)  # type: ignore[arg-type]
