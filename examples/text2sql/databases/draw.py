"""What the databases have in common: names, cities and dates drawn from a seeded generator."""

from __future__ import annotations

import random
from datetime import date, timedelta
from typing import Final

FIRST_NAMES: Final = (
    "Ada", "Amir", "Bea", "Carlos", "Chen", "Dina", "Emil", "Fatima", "Greta", "Hugo", "Ines",
    "Jonas", "Kofi", "Lena", "Marta", "Nadia", "Omar", "Priya", "Quentin", "Rosa", "Sven",
    "Tomoko", "Uma", "Viktor", "Wanda", "Yusuf",
)  # fmt: skip
LAST_NAMES: Final = (
    "Abbas", "Berg", "Costa", "Dvorak", "Eriksen", "Fischer", "Garcia", "Haas", "Ito", "Jensen",
    "Kowalski", "Lopez", "Meyer", "Novak", "Okafor", "Petrov", "Quist", "Rossi", "Silva",
    "Tanaka", "Urban", "Vega", "Weber", "Young", "Zhang",
)  # fmt: skip
CITIES: Final = ("Ashford", "Brookhaven", "Clayton", "Dunmore", "Eastport", "Fairview")


def names(rng: random.Random, count: int) -> list[str]:
    """Return ``count`` different full names; there are 650."""
    whole = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    return rng.sample(whole, count)


def day(rng: random.Random, first: date, last: date) -> date:
    """Return a day from ``first`` to ``last``."""
    return first + timedelta(days=rng.randint(0, (last - first).days))


def later(start: date, days: int) -> str:
    """Return the day ``days`` after ``start`` as ISO text."""
    return (start + timedelta(days=days)).isoformat()
