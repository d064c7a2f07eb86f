"""A clinic: departments, doctors, patients, visits, drugs and prescriptions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import date
from typing import Any, Final

from examples.text2sql.databases.draw import CITIES, day, names

SCHEMA: Final = """
CREATE TABLE department (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL, floor INTEGER NOT NULL
);
CREATE TABLE doctor (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL,
  department_id INTEGER NOT NULL REFERENCES department (id),
  hired_year INTEGER NOT NULL, salary INTEGER NOT NULL
);
CREATE TABLE patient (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL, gender TEXT NOT NULL, born_on TEXT NOT NULL,
  city TEXT NOT NULL, insurance TEXT
);
CREATE TABLE visit (
  id INTEGER PRIMARY KEY, patient_id INTEGER NOT NULL REFERENCES patient (id),
  doctor_id INTEGER NOT NULL REFERENCES doctor (id), visited_on TEXT NOT NULL,
  diagnosis TEXT NOT NULL, minutes INTEGER NOT NULL, fee REAL NOT NULL
);
CREATE TABLE drug (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL, maker TEXT NOT NULL, price REAL NOT NULL
);
CREATE TABLE prescription (
  id INTEGER PRIMARY KEY, visit_id INTEGER NOT NULL REFERENCES visit (id),
  drug_id INTEGER NOT NULL REFERENCES drug (id), days INTEGER NOT NULL
);
"""

DEPARTMENTS: Final = ("Cardiology", "Dermatology", "Neurology", "Orthopedics", "Pediatrics")
DIAGNOSES: Final = ("asthma", "burn", "flu", "fracture", "migraine", "rash", "sprain")
INSURERS: Final = ("Acorn", "Beacon", "Cedar", None)
MAKERS: Final = ("Altera", "Borea", "Corvid")
DRUGS: Final = (
    "Amolin", "Bexar", "Cortane", "Dolorin", "Emerix", "Fluvex", "Gastrol", "Hepalon", "Ibrane",
    "Jovitol", "Kelvane", "Lumirex",
)  # fmt: skip


def rows(rng: random.Random) -> dict[str, list[tuple[Any, ...]]]:
    """Return the rows of all tables, in an order that foreign keys allow."""
    people = names(rng, 24 + 300)
    return {
        "department": [(i, name, rng.randint(1, 4)) for i, name in enumerate(DEPARTMENTS, start=1)],
        "doctor": [
            (i, name, 1 + i % 5, rng.randint(1995, 2023), rng.randint(70, 180) * 1000)
            for i, name in enumerate(people[:24], start=1)
        ],
        "patient": [_patient(rng, i, name) for i, name in enumerate(people[24:], start=1)],
        "visit": list(_visits(rng, 1100)),
        "drug": [
            (i, name, rng.choice(MAKERS), rng.randint(300, 9000) / 100)
            for i, name in enumerate(DRUGS, start=1)
        ],
        "prescription": [
            (i, rng.randint(1, 1100), rng.randint(1, 12), rng.choice((5, 7, 10, 14, 30)))
            for i in range(1, 801)
        ],
    }


def _patient(rng: random.Random, number: int, name: str) -> tuple[Any, ...]:
    born = day(rng, date(1935, 1, 1), date(2020, 12, 31)).isoformat()
    gender = rng.choice(("female", "male"))
    return number, name, gender, born, rng.choice(CITIES), rng.choice(INSURERS)


def _visits(rng: random.Random, count: int) -> Iterator[tuple[Any, ...]]:
    for number in range(1, count + 1):
        visited = day(rng, date(2022, 1, 1), date(2024, 6, 30)).isoformat()
        minutes = rng.choice((10, 15, 20, 30, 45, 60))
        fee = 25 + 2.5 * minutes
        yield (
            number, rng.randint(1, 300), rng.randint(1, 24), visited, rng.choice(DIAGNOSES),
            minutes, fee,
        )  # fmt: skip
