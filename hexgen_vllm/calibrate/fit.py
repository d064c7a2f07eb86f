"""From response timings to a step cost: two small least-squares fits with no negative term.

Formulas as in :class:`hexgen_vllm.types.StepCost`:

- The first token of a lone call of n prompt tokens comes after ``k (c0 + p0) + p1 n + p2 n²/2``
  with k the steps that n tokens take, plus the round trip, which is measured apart.
- A decode step of b calls with mean context x takes ``c0 + c1 b + c2 b x``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

import numpy as np

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.types import StepCost


@dataclass(frozen=True, slots=True)
class PrefillTiming:
    """Time to first token of a lone call, without the round trip, seconds."""

    prompt_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class DecodeTiming:
    """Mean time of a decode step, seconds; ``context`` is the mean tokens of one call."""

    batch: int
    context: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Fit:
    """A step cost and the median relative error with which it tells the measured times."""

    cost: StepCost
    error: float


def fit(
    prefills: Sequence[PrefillTiming], decodes: Sequence[DecodeTiming], chunk: int | None
) -> Fit:
    """Return the step cost that explains the timings best, in relative terms.

    Args:
        prefills: at least three different lengths.
        decodes: at least two different batches.
        chunk: prompt tokens of a step, ``None`` when it is not known: one step then.

    Raises:
        ConfigError: there are too few timings.
    """
    if len({p.prompt_tokens for p in prefills}) < 2 or len({d.batch for d in decodes}) < 1:
        raise ConfigError("too few calls were answered to fit a step cost.")
    c0, c1, c2 = _non_negative(
        [[1.0, d.batch, d.batch * d.context] for d in decodes], [d.seconds for d in decodes]
    )
    steps = [math.ceil(p.prompt_tokens / chunk) if chunk else 1 for p in prefills]
    rows = [
        [k, p.prompt_tokens, p.prompt_tokens**2 / 2] for k, p in zip(steps, prefills, strict=True)
    ]
    step, p1, p2 = _non_negative(rows, [p.seconds for p in prefills])
    cost = StepCost(c0, c1, c2, max(step - c0, 0.0), p1, p2)
    told = [cost.step_s(d.batch, d.batch * d.context) / d.seconds for d in decodes]
    told += [
        (k * (cost.c0 + cost.p0) + p1 * row[1] + p2 * row[2]) / p.seconds
        for k, row, p in zip(steps, rows, prefills, strict=True)
    ]
    return Fit(cost, median(abs(ratio - 1.0) for ratio in told))


def overhead_s(prefills: Sequence[PrefillTiming], cost: StepCost, chunk: int) -> float:
    """Return the median seconds that a call takes beyond the engine's own steps, at least 0."""
    beyond = (
        p.seconds
        - cost.c0 * math.ceil(p.prompt_tokens / chunk)
        - cost.prefill_s(p.prompt_tokens, chunk=chunk)
        for p in prefills
    )
    return max(median(beyond), 0.0)


def _non_negative(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Return the least-squares coefficients of relative errors, none below 0.

    With three columns all subsets can be tried; the best feasible one is the exact optimum.
    """
    scale = 1.0 / np.asarray(seconds)
    x, y = np.asarray(rows, dtype=float) * scale[:, None], np.ones(len(rows))
    columns = x.shape[1]
    best, least = [0.0] * columns, math.inf
    for size in range(1, columns + 1):
        for chosen in map(list, combinations(range(columns), size)):
            found, _, rank, _ = np.linalg.lstsq(x[:, chosen], y, rcond=None)
            if rank < size or min(found) < 0:
                continue
            loss = float(np.sum((x[:, chosen] @ found - y) ** 2))
            if loss < least - 1e-12:
                least, best = loss, [0.0] * columns
                for column, value in zip(chosen, found, strict=True):
                    best[column] = float(value)
    return best
