"""When workflows arrive. Times are seconds since the start of the run, ascending."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from itertools import accumulate

from hexgen_vllm.errors import ConfigError


def poisson(count: int, rate_per_s: float, rng: random.Random) -> tuple[float, ...]:
    """Return ``count`` arrivals of a Poisson process.

    Raises:
        ConfigError: the rate is not a finite number above 0.
    """
    _check_rate(rate_per_s)
    return _running_sum(rng.expovariate(rate_per_s) for _ in range(count))


def gamma_bursts(
    count: int, rate_per_s: float, variation: float, rng: random.Random
) -> tuple[float, ...]:
    """Return ``count`` arrivals whose gaps follow a gamma distribution.

    Args:
        count: how many.
        rate_per_s: mean arrivals per second.
        variation: standard deviation of a gap over its mean; 1 is Poisson, more comes in bursts.
        rng: where randomness comes from.

    Raises:
        ConfigError: rate or variation is not a finite number above 0.
    """
    _check_rate(rate_per_s)
    if not (math.isfinite(variation) and variation > 0):
        raise ConfigError(f"the variation of arrivals must be more than 0, not {variation:g}.")
    shape = 1.0 / variation**2
    return _running_sum(rng.gammavariate(shape, 1.0 / (rate_per_s * shape)) for _ in range(count))


def recorded(times_s: Sequence[float], *, speed: float = 1.0) -> tuple[float, ...]:
    """Return recorded arrivals from 0 on, played ``speed`` times as fast.

    Raises:
        ConfigError: a time is not finite or earlier than the one before, or the speed is not
            more than 0.
    """
    if not (math.isfinite(speed) and speed > 0):
        raise ConfigError(f"the speed of recorded arrivals must be more than 0, not {speed:g}.")
    for index, at in enumerate(times_s):
        if not math.isfinite(at) or (index and at < times_s[index - 1]):
            raise ConfigError(f"recorded arrival {index + 1} must not be before the one before it.")
    return tuple((at - times_s[0]) / speed for at in times_s)


def _check_rate(rate_per_s: float) -> None:
    if not (math.isfinite(rate_per_s) and rate_per_s > 0):
        raise ConfigError(f"the arrival rate must be more than 0 per second, not {rate_per_s:g}.")


def _running_sum(gaps: Iterable[float]) -> tuple[float, ...]:
    return tuple(accumulate(gaps))
