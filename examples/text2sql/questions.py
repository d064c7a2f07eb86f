"""The questions with their gold SQL, and who asks which."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from examples.text2sql.matching import orders_rows, same_rows
from examples.text2sql.sandbox import Row, Sandbox

FILE: Final = Path(__file__).with_name("questions.yaml")


@dataclass(frozen=True)
class Question:
    """A question about a database.

    Attributes:
        id: database and number.
        database: name of the database.
        path: its file.
        text: the question.
        gold: a query that answers it.
        rows: what ``gold`` returns.
    """

    id: str
    database: str
    path: Path
    text: str
    gold: str
    rows: tuple[Row, ...]

    def is_matched_by(self, rows: Sequence[Row] | None) -> bool:
        """Return whether ``rows`` are the gold rows; their order counts where gold orders them."""
        return rows is not None and same_rows(rows, self.rows, ordered=orders_rows(self.gold))


def load(paths: Mapping[str, Path], file: Path = FILE) -> list[Question]:
    """Return the questions about the databases ``paths``.

    Raises:
        ValueError: a gold query does not run.
    """
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    return [
        _question(name, number, paths[name], entry)
        for name, entries in found.items()
        for number, entry in enumerate(entries, start=1)
    ]


def _question(database: str, number: int, path: Path, entry: Mapping[str, str]) -> Question:
    outcome = Sandbox(path).run(entry["sql"])
    if outcome.rows is None:
        raise ValueError(f"gold query {number} of {database}: {outcome.error}")
    return Question(f"{database}-{number}", database, path, entry["q"], entry["sql"], outcome.rows)


def drawn(questions: Sequence[Question], count: int, rng: random.Random) -> list[Question]:
    """Return ``count`` questions in random order; none comes again before all have been drawn."""
    found: list[Question] = []
    while len(found) < count:
        found += rng.sample(questions, len(questions))
    return found[:count]
