"""A city library: branches, authors, books, their copies, members and loans."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import date
from typing import Any, Final

from examples.text2sql.databases.draw import CITIES, day, later, names

SCHEMA: Final = """
CREATE TABLE branch (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL, city TEXT NOT NULL, opened_year INTEGER NOT NULL
);
CREATE TABLE author (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL, country TEXT NOT NULL, born_year INTEGER NOT NULL
);
CREATE TABLE book (
  id INTEGER PRIMARY KEY, title TEXT NOT NULL, author_id INTEGER NOT NULL REFERENCES author (id),
  genre TEXT NOT NULL, published_year INTEGER NOT NULL, pages INTEGER NOT NULL
);
CREATE TABLE copy (
  id INTEGER PRIMARY KEY, book_id INTEGER NOT NULL REFERENCES book (id),
  branch_id INTEGER NOT NULL REFERENCES branch (id), condition TEXT NOT NULL
);
CREATE TABLE member (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL, city TEXT NOT NULL, kind TEXT NOT NULL,
  joined_on TEXT NOT NULL
);
CREATE TABLE loan (
  id INTEGER PRIMARY KEY, copy_id INTEGER NOT NULL REFERENCES copy (id),
  member_id INTEGER NOT NULL REFERENCES member (id), loaned_on TEXT NOT NULL,
  due_on TEXT NOT NULL, returned_on TEXT
);
"""

BRANCHES: Final = ("Central", "Riverside", "Hillcrest", "Harbour", "Old Mill")
COUNTRIES: Final = ("Brazil", "Egypt", "France", "India", "Japan", "Norway")
GENRES: Final = ("crime", "fantasy", "history", "poetry", "science", "travel")
KINDS: Final = ("adult", "adult", "adult", "student", "student", "child")
CONDITIONS: Final = ("new", "good", "good", "worn")
_ADJECTIVES: Final = (
    "Silent", "Golden", "Lost", "Winter", "Hidden", "Broken", "Distant", "Quiet", "Burning",
    "Forgotten", "Second", "Northern",
)  # fmt: skip
_NOUNS: Final = (
    "River", "Garden", "Letter", "Harbour", "Mountain", "Machine", "Island", "Orchard", "Mirror",
    "Road", "Station", "Clock", "Forest",
)  # fmt: skip
_LOAN_DAYS: Final = 28


def rows(rng: random.Random) -> dict[str, list[tuple[Any, ...]]]:
    """Return the rows of all tables, in an order that foreign keys allow."""
    titles = rng.sample([f"The {a} {n}" for a in _ADJECTIVES for n in _NOUNS], 150)
    return {
        "branch": [
            (i, name, rng.choice(CITIES), rng.randint(1950, 2015))
            for i, name in enumerate(BRANCHES, start=1)
        ],
        "author": [
            (i, name, rng.choice(COUNTRIES), rng.randint(1900, 1990))
            for i, name in enumerate(names(rng, 40), start=1)
        ],
        "book": [_book(rng, i, title) for i, title in enumerate(titles, start=1)],
        "copy": [
            (i, rng.randint(1, 150), rng.randint(1, 5), rng.choice(CONDITIONS))
            for i in range(1, 401)
        ],
        "member": [
            (i, name, rng.choice(CITIES), rng.choice(KINDS), _joined(rng))
            for i, name in enumerate(names(rng, 200), start=1)
        ],
        "loan": list(_loans(rng, 1200)),
    }


def _book(rng: random.Random, number: int, title: str) -> tuple[Any, ...]:
    return (
        number, title, rng.randint(1, 40), rng.choice(GENRES), rng.randint(1960, 2023),
        rng.randint(80, 900),
    )  # fmt: skip


def _joined(rng: random.Random) -> str:
    return day(rng, date(2015, 1, 1), date(2022, 12, 31)).isoformat()


def _loans(rng: random.Random, count: int) -> Iterator[tuple[Any, ...]]:
    for number in range(1, count + 1):
        start = day(rng, date(2023, 1, 1), date(2024, 6, 30))
        returned = None if rng.random() < 0.08 else later(start, rng.randint(1, 45))
        yield (
            number, rng.randint(1, 400), rng.randint(1, 200), start.isoformat(),
            later(start, _LOAN_DAYS), returned,
        )  # fmt: skip
