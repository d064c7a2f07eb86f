"""Step cost of one engine, learned online from its own step timings.

The model is :class:`hexgen_vllm.types.StepCost`: six coefficients, linear in what a step
contains. It is fitted by recursive least squares with a forgetting factor. Two guards make it
fit for production traces: residuals far outside the usual spread weigh less (Huber), so that a
garbage collection or a compilation does not bend the line; and forgetting pauses while steps
bring no new information, so that a long monotonous phase does not blow up the covariance.

Cost: about 20 microseconds an observation, constant memory.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Final

from hexgen_vllm.types import StepCost

_N: Final = 6
# Brings every feature to the order of 1, so that one prior fits all coefficients.
_SCALES: Final = (1.0, 0.1, 1e-4, 1.0, 1e-3, 1e-6)
_PRIOR: Final = 1e2
_MAX_TRACE: Final = 1e3
_HUBER: Final = 2.5


@dataclass(frozen=True, slots=True)
class StepShape:
    """What one engine step contained.

    Attributes:
        n_decode: sequences that decoded.
        ctx_decode: sum of their context tokens.
        n_prefill: prompt tokens computed.
        prefill_ctx: sum over prefill chunks of tokens times mean context.
    """

    n_decode: int
    ctx_decode: int = 0
    n_prefill: int = 0
    prefill_ctx: float = 0.0

    def features(self) -> tuple[float, ...]:
        """Return the scaled regressors, shape (6,)."""
        raw = (
            1.0,
            self.n_decode,
            self.ctx_decode,
            1.0 if self.n_prefill else 0.0,
            self.n_prefill,
            self.prefill_ctx,
        )
        return tuple(r * s for r, s in zip(raw, _SCALES, strict=True))


class CostFit:
    """Online fit of a :class:`StepCost`.

    Args:
        forgetting: weight of the past per observation, in (0, 1].
        min_steps: observations before the fit is known.
        min_prefills: of which with prefill; until then prefill cost is unknown.
    """

    def __init__(
        self, *, forgetting: float = 0.998, min_steps: int = 20, min_prefills: int = 3
    ) -> None:
        self._forgetting = forgetting
        self._min_steps, self._min_prefills = min_steps, min_prefills
        self._theta = [0.0] * _N
        self._p = [[_PRIOR if i == j else 0.0 for j in range(_N)] for i in range(_N)]
        self._errors: deque[float] = deque(maxlen=128)
        self._spread_s = 0.0
        self._cost: StepCost | None = None  # of the present coefficients, once asked for
        self.steps = 0
        self.prefills = 0

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Learn that a step of ``shape`` took ``seconds``; values <= 0 are ignored."""
        if seconds > 0:
            self.prefills += shape.n_prefill > 0
            self._observe(shape.features(), seconds)

    def observe_call(
        self, output_tokens: int, n_decode: float, context: float, uncached: int, seconds: float
    ) -> None:
        """Learn from a whole call, where the steps themselves cannot be seen.

        A call is ``output_tokens`` decode steps plus its prefill; dividing by the number of steps
        gives one average step, in which the model is linear too.

        Args:
            output_tokens: tokens it produced.
            n_decode: mean number of sequences it shared the batch with, itself included.
            context: its mean context tokens.
            uncached: prompt tokens that had to be prefilled.
            seconds: from its start (not its queueing) to its end.
        """
        if seconds <= 0 or output_tokens <= 0:
            return
        n = output_tokens
        raw = (
            1.0,
            n_decode,
            n_decode * context,
            1.0 / n,
            uncached / n,
            uncached * uncached / 2 / n,
        )
        self.prefills += 1
        self._observe(tuple(r * s for r, s in zip(raw, _SCALES, strict=True)), seconds / n)

    def _observe(self, x: tuple[float, ...], seconds: float) -> None:
        residual = seconds - sum((t * v for t, v in zip(self._theta, x, strict=True)), 0.0)
        self.steps += 1
        self._cost = None
        if self.steps > _N:
            self._errors.append(abs(residual) / seconds)
        self._update(x, residual, self._weight(residual))

    def _weight(self, residual: float) -> float:
        """Return the Huber weight and move the running spread of residuals."""
        size, spread = abs(residual), self._spread_s
        if self.steps <= 2 * _N or spread == 0.0:
            self._spread_s = size if spread == 0.0 else 0.7 * spread + 0.3 * size
            return 1.0
        limit = _HUBER * spread
        self._spread_s = 0.98 * spread + 0.02 * min(size, 2 * limit)
        return 1.0 if size <= limit else limit / size

    def _update(self, x: tuple[float, ...], residual: float, weight: float) -> None:
        p = self._p
        px = [sum((row[j] * x[j] for j in range(_N)), 0.0) for row in p]
        gain = 1.0 / (
            self._forgetting / weight + sum((a * b for a, b in zip(x, px, strict=True)), 0.0)
        )
        for i in range(_N):
            self._theta[i] += px[i] * gain * residual
        trace = sum((p[i][i] for i in range(_N)), 0.0)
        keep = 1.0 / self._forgetting if trace < _MAX_TRACE else 1.0
        for i in range(_N):
            row, scale = p[i], px[i] * gain
            for j in range(_N):
                row[j] = (row[j] - scale * px[j]) * keep

    def known(self) -> bool:
        """Whether there is evidence for both decode and prefill."""
        return self.steps >= self._min_steps and self.prefills >= self._min_prefills

    def cost(self) -> StepCost | None:
        """Return the fit with negative coefficients cut to 0, or ``None`` while unknown."""
        if self._cost is None and self.known():
            values = (max(t, 0.0) * s for t, s in zip(self._theta, _SCALES, strict=True))
            self._cost = StepCost(*values)
        return self._cost

    def error(self) -> float | None:
        """Return the median relative error of recent one-step predictions, ``None`` if none."""
        return median(self._errors) if self._errors else None
