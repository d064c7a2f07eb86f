"""A step cost in the seven coefficients of vllm-router's program scheduling.

vllm-router calibrates one model for a whole fleet; here every device has its own. It knows two
formulas, in seconds, tokens n counted in thousands::

    prefill(n)       = intercept + linear * n + quadratic * n^2
    decode step(b,c) = fixed + batch * b + context * c

A :class:`~hexgen_vllm.types.StepCost` says the same with a prompt computed in one step.
``decode_throughput_alpha``, the share of decode throughput that is left while a prompt is
computed, follows from the rest.
"""

from __future__ import annotations

from typing import Final

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
