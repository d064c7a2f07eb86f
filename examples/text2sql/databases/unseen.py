"""Two databases that the demo's model was not trained on: an airline and a school of music."""

from __future__ import annotations

import random
from datetime import date
from typing import Any, Final

from examples.text2sql.databases.draw import CITIES, day, names

AIRLINE: Final = """
CREATE TABLE airport (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL, country TEXT NOT NULL, runways INTEGER NOT NULL
);
CREATE TABLE plane (
  id INTEGER PRIMARY KEY, model TEXT NOT NULL, maker TEXT NOT NULL, seats INTEGER NOT NULL,
  built_year INTEGER NOT NULL
);
CREATE TABLE flight (
  id INTEGER PRIMARY KEY, plane_id INTEGER NOT NULL REFERENCES plane (id),
  airport_id INTEGER NOT NULL REFERENCES airport (id), status TEXT NOT NULL,
  distance INTEGER NOT NULL, departed_on TEXT NOT NULL
);
CREATE TABLE ticket (
  id INTEGER PRIMARY KEY, flight_id INTEGER NOT NULL REFERENCES flight (id),
  class TEXT NOT NULL, price INTEGER NOT NULL, refunded_on TEXT
);
"""
MUSIC: Final = """
CREATE TABLE teacher (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL, instrument TEXT NOT NULL, wage INTEGER NOT NULL
);
CREATE TABLE pupil (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL, city TEXT NOT NULL, age INTEGER NOT NULL,
  teacher_id INTEGER NOT NULL REFERENCES teacher (id)
);
CREATE TABLE lesson (
  id INTEGER PRIMARY KEY, pupil_id INTEGER NOT NULL REFERENCES pupil (id),
  minutes INTEGER NOT NULL, room TEXT NOT NULL, held_on TEXT NOT NULL, paid_on TEXT
);
"""
_AIRPORTS: Final = ("Arlanda", "Barajas", "Changi", "Dorval", "Ezeiza", "Fiumicino")
_LANDS: Final = ("Sweden", "Spain", "Singapore", "Canada", "Argentina", "Italy")
_INSTRUMENTS: Final = ("cello", "flute", "harp", "piano", "violin")


def airline(rng: random.Random) -> dict[str, list[tuple[Any, ...]]]:
    """Return the rows of the airline."""
    first = date(2022, 1, 1)
    return {
        "airport": [
            (i, name, land, rng.randint(1, 5))
            for i, (name, land) in enumerate(zip(_AIRPORTS, _LANDS, strict=True), start=1)
        ],
        "plane": [
            (i, f"{maker} {100 + 7 * i}", maker, rng.randint(40, 400), rng.randint(1990, 2023))
            for i, maker in enumerate((rng.choice(("Airbus", "Boeing", "Embraer"))
                                       for _ in range(30)), start=1)
        ],
        "flight": [
            (i, rng.randint(1, 28), rng.randint(1, 6),
             rng.choice(("landed", "landed", "delayed", "cancelled")), rng.randint(200, 9000),
             day(rng, first, date(2024, 6, 30)).isoformat())
            for i in range(1, 401)
        ],
        "ticket": [
            (i, rng.randint(1, 380), rng.choice(("economy", "economy", "business")),
             rng.randint(50, 900),
             day(rng, first, date(2024, 6, 30)).isoformat() if rng.random() < 0.1 else None)
            for i in range(1, 1201)
        ],
    }  # fmt: skip


def music(rng: random.Random) -> dict[str, list[tuple[Any, ...]]]:
    """Return the rows of the school of music."""
    people, first, last = names(rng, 15 + 120), date(2022, 1, 1), date(2024, 6, 30)
    return {
        "teacher": [
            (i, name, rng.choice(_INSTRUMENTS), rng.randint(20, 60))
            for i, name in enumerate(people[:15], start=1)
        ],
        "pupil": [
            (i, name, rng.choice(CITIES), rng.randint(6, 70), rng.randint(1, 14))
            for i, name in enumerate(people[15:], start=1)
        ],
        "lesson": [
            (i, rng.randint(1, 115), rng.choice((30, 45, 60)), rng.choice(("blue", "green", "red")),
             day(rng, first, last).isoformat(),
             None if rng.random() < 0.1 else day(rng, first, last).isoformat())
            for i in range(1, 801)
        ],
    }  # fmt: skip
