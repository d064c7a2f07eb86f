"""Whether what a search found is worth a change: paired differences on seeds that it never saw.

The best of many candidates looks better than it is on the seeds that chose it. So it is played
again on fresh ones, beside the setting in force and beside other policies; all see the same
workflows at the same times. A difference is *beyond noise* when its 95 % confidence interval, from
Student's t over the seeds, lies above 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any, Final, NamedTuple

from hexgen_vllm.sim.policies import Policy
from hexgen_vllm.tune.online import TUNED

_CAP: Final = 2.0
_RACE_SEEDS: Final = 2
_RACE_MARGIN: Final = 1.25
# Student's t, two-sided 95 %, by degrees of freedom from 1.
_T: Final = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip

Play = Callable[[Sequence[tuple[Policy, int]]], Sequence[float]]
"""Return the loss of every (policy, seed)."""


class Gain(NamedTuple):
    """By how much one loss is lower than another, with its 95 % confidence interval.

    Attributes:
        mean: over the seeds.
        low, high: ends of the interval.
        error: standard error of the mean.
    """

    mean: float
    low: float
    high: float
    error: float

    @property
    def beyond_noise(self) -> bool:
        """Whether it is a gain for certain."""
        return self.low > 0.0

    def __str__(self) -> str:
        return f"{self.mean:+.3g} [{self.low:+.3g}, {self.high:+.3g}]"


def t_quantile(freedom: int) -> float:
    """Return Student's t of 97.5 %; its usual approximation beyond 20 degrees of freedom."""
    return _T[freedom - 1] if freedom <= len(_T) else 1.96 + 2.5 / freedom


def paired(before: Sequence[float], after: Sequence[float]) -> Gain:
    """Return the gain of ``after`` over ``before``, seed by seed.

    Raises:
        ValueError: there are fewer than two seeds, or one of them has one loss only.
    """
    gains = [a - b for a, b in zip(before, after, strict=True)]
    if len(gains) < 2:
        raise ValueError("a difference needs two seeds")
    mean, error = fmean(gains), stdev(gains) / math.sqrt(len(gains))
    reach = t_quantile(len(gains) - 1) * error
    return Gain(mean, mean - reach, mean + reach, error)


@dataclass(slots=True)
class Entrant:
    """A policy in the race, with its options, and its losses by seed."""

    name: str
    policy: Policy
    losses: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a search.

    Attributes:
        proposed: what to change to, ``None`` to keep what is in force.
        why: in words.
        best: the contender with the least loss.
        gain: of the best over what is in force.
        over: gains of the best over each other contender that was played on all seeds.
        means: mean losses by contender; those that were out of the race early have fewer seeds.
        found: what the search found, or what is in force if that is nothing else.
    """

    proposed: Entrant | None
    why: str
    best: Entrant
    gain: Gain
    over: Mapping[str, Gain]
    means: Mapping[str, float]
    found: Entrant

    def told(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return {
            "keep": self.proposed is None,
            "why": self.why,
            "best": self.best.name,
            "policy": None if self.proposed is None else self.proposed.policy.name,
            "gain": self.gain.mean,
            "interval": [self.gain.low, self.gain.high],
            "error": self.gain.error,
            "over": {name: gain._asdict() for name, gain in self.over.items()},
            "losses": dict(self.means),
        }


def race(contenders: Sequence[Entrant], seeds: Sequence[int], play: Play) -> None:
    """Play contenders on ``seeds``; rivals that are far behind on the first two stay there.

    The first two contenders, what is in force and what was found, are played on all.
    """
    first, rest = seeds[:_RACE_SEEDS], seeds[_RACE_SEEDS:]
    _play(contenders, first, play)
    least = {seed: min(c.losses[seed] for c in contenders) for seed in first}
    near = [
        c
        for index, c in enumerate(contenders)
        if index < 2 or any(c.losses[s] <= _farthest(least[s]) for s in first)
    ]
    _play(near, rest, play)


def _farthest(least: float) -> float:
    """Return the loss up to which a contender is near; losses may be below 0."""
    return least + (_RACE_MARGIN - 1.0) * abs(least)


def _play(contenders: Sequence[Entrant], seeds: Sequence[int], play: Play) -> None:
    tasks = [(contender, seed) for seed in seeds for contender in contenders]
    losses = play([(contender.policy, seed) for contender, seed in tasks])
    for (contender, seed), loss in zip(tasks, losses, strict=True):
        contender.losses[seed] = loss


def judge(contenders: Sequence[Entrant], seeds: Sequence[int]) -> Verdict:
    """Return what becomes of a search.

    Args:
        contenders: what is in force first, then what was found, if that is something else.
        seeds: all that were to be played; at least two.
    """
    finite = [v for c in contenders for v in c.losses.values() if math.isfinite(v)]
    # Out of reach counts as twice the worst that is within.
    cap = max((abs(v) for v in finite), default=1.0) * _CAP
    capped = {
        c.name: {s: v if math.isfinite(v) else cap for s, v in c.losses.items()} for c in contenders
    }
    means = {name: fmean(losses.values()) for name, losses in capped.items()}
    whole = [c for c in contenders if len(c.losses) == len(seeds)]
    present, best = contenders[0], min(whole, key=lambda c: means[c.name])
    searched = next((c for c in contenders[1:2] if c.name.endswith(TUNED)), present)

    def over(other: Entrant) -> Gain:
        pairs = [capped[c.name] for c in (other, best)]
        return paired(*([losses[s] for s in seeds] for losses in pairs))

    gains = {c.name: over(c) for c in whole if c is not best}
    if best is present:
        nothing = Gain(0.0, 0.0, 0.0, 0.0)
        why = "nothing better was found"
        return Verdict(None, why, best, nothing, gains, means, searched)
    gain = gains[present.name]
    close = [n for n, g in gains.items() if not g.beyond_noise and n != present.name]
    proposed = None
    if not gain.beyond_noise:
        why = f"the gain of {best.name}, {gain}, is within the noise"
    elif close:
        why = f"{best.name} gains {gain}, but is no better than {' and '.join(close)} beyond noise"
    else:
        proposed, why = best, f"{best.name} gains {gain} and beats all others beyond noise"
    return Verdict(proposed, why, best, gain, gains, means, searched)
