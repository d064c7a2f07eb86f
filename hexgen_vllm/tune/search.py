"""Search over knobs: a grid for one of them, successive halving for several.

All candidates see the same workflows at the same times (common random numbers), so that their
differences show with few runs. Halving starts with many candidates spread over the space (a Latin
hypercube, and the present values), plays one seed, keeps the better half, adds a seed, and so on.
The rest of the budget refines around the best. The present values stay to the end: a proposal is
always compared with them on all seeds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Final

from hexgen_vllm.tune.knobs import Knob, Values

Task = tuple[Values, int]
Evaluate = Callable[[Sequence[Task]], Sequence[float]]
"""Return the loss of every (values, seed)."""

_KEEP: Final = 0.5
_FIRST_RADIUS: Final = 0.2
_PER_ROUND: Final = 4


@dataclass(slots=True)
class Trial:
    """One candidate and its losses, by seed."""

    values: dict[str, float]
    losses: dict[int, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean loss over the seeds played."""
        return fmean(self.losses.values()) if self.losses else math.inf

    def gain_over(self, other: Trial) -> tuple[float, float]:
        """Return by how much its loss is lower, and the standard error of that.

        Both are taken over the seeds that both have played, pair by pair. With one common seed
        the error is ``inf``: a difference without spread proves nothing.
        """
        common = sorted(self.losses.keys() & other.losses.keys())
        gains = [other.losses[s] - self.losses[s] for s in common]
        if not gains or not all(map(math.isfinite, gains)):
            return (other.mean - self.mean if common else math.nan), math.inf
        if len(gains) < 2:
            return gains[0], math.inf
        return fmean(gains), stdev(gains) / math.sqrt(len(gains))


class Search:
    """The candidates of one tuning and what is known of them.

    Args:
        evaluate: plays candidates.
        seeds: workloads to play, at least one; each is the same for all candidates.
        present: values in force.

    Attributes:
        trials: all candidates, the present values first.
        runs: simulations so far.
    """

    def __init__(self, evaluate: Evaluate, seeds: Sequence[int], present: Values) -> None:
        self._evaluate, self._seeds = evaluate, list(seeds)
        self.trials = [Trial(dict(present))]
        self.runs = 0

    @property
    def present(self) -> Trial:
        """The values in force."""
        return self.trials[0]

    def best(self) -> Trial:
        """Return the best candidate that was played on all seeds; ties go to the first."""
        whole = [t for t in self.trials if len(t.losses) == len(self._seeds)]
        return min(whole or self.trials, key=lambda t: t.mean)

    def play(self, trials: Iterable[Trial], seeds: Sequence[int]) -> None:
        """Play what is still missing of ``trials`` on ``seeds``."""
        missing = [(t, s) for t in trials for s in seeds if s not in t.losses]
        losses = self._evaluate([(t.values, s) for t, s in missing])
        for (trial, seed), loss in zip(missing, losses, strict=True):
            trial.losses[seed] = loss
        self.runs += len(missing)

    def add(self, values: Values) -> Trial:
        """Return the candidate with ``values``, new or known."""
        for trial in self.trials:
            if trial.values == dict(values):
                return trial
        self.trials.append(Trial(dict(values)))
        return self.trials[-1]

    def grid(self, knob: Knob, points: int) -> None:
        """Play ``points`` equal steps of one knob on all seeds."""
        for index in range(points):
            value = knob.at(index / max(points - 1, 1))
            self.add({**self.present.values, knob.name: value})
        self.play(self.trials, self._seeds)

    def halving(self, knobs: Sequence[Knob], budget: int, rng: random.Random) -> None:
        """Search ``knobs`` with at most about ``budget`` simulations."""
        count = max(budget // (2 * (1 + math.ceil(math.log2(len(self._seeds) + 1)))), 2)
        for point in latin_hypercube(len(knobs), count, rng):
            self.add({k.name: k.at(x) for k, x in zip(knobs, point, strict=True)})
        alive = list(self.trials)
        played = 1
        while True:
            seeds = self._seeds[:played]
            self.play([self.present, *alive], seeds)
            if played == len(self._seeds):
                break
            alive.sort(key=lambda t: t.mean)
            alive = alive[: max(math.ceil(len(alive) * _KEEP), 2)]
            played = min(2 * played, len(self._seeds))
        self._refine(knobs, budget, rng)

    def _refine(self, knobs: Sequence[Knob], budget: int, rng: random.Random) -> None:
        """Spend what is left around the best candidate, in an ever smaller neighbourhood."""
        radius = _FIRST_RADIUS
        while self.runs + len(self._seeds) <= budget and radius > 0.01:
            before = self.best()
            near = [self.add(_near(before.values, knobs, radius, rng)) for _ in range(_PER_ROUND)]
            self.play(near, self._seeds[:1])
            self.play([min(near, key=lambda t: t.mean)], self._seeds)
            if self.best() is before:
                radius /= 2


def latin_hypercube(dimensions: int, count: int, rng: random.Random) -> list[list[float]]:
    """Return ``count`` points of the unit cube, one in each of ``count`` slices of each axis."""
    columns = []
    for _ in range(dimensions):
        column = [(i + rng.random()) / count for i in range(count)]
        rng.shuffle(column)
        columns.append(column)
    return [list(point) for point in zip(*columns, strict=True)]


def _near(
    values: Values, knobs: Sequence[Knob], radius: float, rng: random.Random
) -> dict[str, float]:
    return {k.name: k.at(k.share(values[k.name]) + rng.uniform(-radius, radius)) for k in knobs}
