"""Length distributions given by a few quantiles, straight lines between them."""

from __future__ import annotations

import random
from bisect import bisect_right
from dataclasses import dataclass

from hexgen_vllm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A distribution of token counts.

    Attributes:
        points: (share, tokens) pairs, shares rising from 0 to 1, tokens never falling.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        shares = [share for share, _ in self.points]
        tokens = [value for _, value in self.points]
        rising = shares == sorted(set(shares)) and tokens == sorted(tokens)
        if len(shares) < 2 or shares[0] != 0 or shares[-1] != 1 or not rising:
            raise ConfigError("quantiles must go from share 0 to share 1 and never fall.")

    def at(self, share: float) -> int:
        """Return the token count that ``share`` of draws do not exceed; share is in [0, 1]."""
        index = min(bisect_right(self.points, (share, float("inf"))), len(self.points) - 1)
        (left, low), (right, high) = self.points[index - 1], self.points[index]
        return round(low + (high - low) * (share - left) / (right - left))

    def draw(self, rng: random.Random) -> int:
        """Return one draw."""
        return self.at(rng.random())


def quantiles(*points: tuple[float, float]) -> Quantiles:
    """Return the distribution through ``points``, each (percent, tokens)."""
    return Quantiles(tuple((percent / 100, tokens) for percent, tokens in points))
