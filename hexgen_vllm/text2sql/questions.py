"""Questions with their gold SQL, and which are asked."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hexgen_vllm import yaml_files
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.text2sql.database import Database
from hexgen_vllm.text2sql.options import MOST_QUESTION_CHARS
from hexgen_vllm.text2sql.outcome import QueryOutcome, Row, orders_rows, same_rows


@dataclass(frozen=True)
class Question:
    """A question about a database.

    Attributes:
        id: name of the database and a number.
        name: short name of the database.
        database: the database.
        text: the question.
        gold: a query that answers it, empty when none is known.
        rows: what ``gold`` returns.
    """

    id: str
    name: str
    database: Database
    text: str
    gold: str = ""
    rows: tuple[Row, ...] = ()

    def is_matched_by(self, rows: Sequence[Row] | None, sql: str = "") -> bool:
        """Return whether ``rows`` are the gold rows; their order counts where gold orders them.

        Args:
            rows: the result of an answer, ``None`` when it has none.
            sql: its query, for those who compare otherwise.
        """
        if rows is None or not self.gold:
            return False
        return same_rows(rows, self.rows, ordered=orders_rows(self.gold))


def load(databases: Mapping[str, Database], file: Path) -> list[Question]:
    """Return the questions of a YAML file about ``databases``.

    Args:
        databases: databases by name.
        file: a mapping of names to lists of ``{q: question, sql: gold}``, where ``sql`` may lack;
            of one database the list alone will do.

    Raises:
        ConfigError: ``file`` holds something else, or a gold query does not run.
    """
    found = yaml_files.read(file).value
    if isinstance(found, list) and len(databases) == 1:
        found = dict.fromkeys(databases, found)
    if not isinstance(found, dict) or not all(isinstance(one, list) for one in found.values()):
        raise ConfigError(f"{file} must be a mapping of databases to lists of questions.")
    for name in found:
        if name not in databases:
            names = ", ".join(databases)
            raise ConfigError(f"{file}: unknown database {name!r}; known are {names}.")
    known = [
        _question(name, number, databases[name], entry)
        for name, entries in found.items()
        for number, entry in enumerate(entries, start=1)
    ]
    if not known:
        raise ConfigError(f"{file} holds no question.")
    return known


def _question(name: str, number: int, database: Database, entry: Any) -> Question:
    where = f"question {number} of {name}"
    text, gold = (entry.get("q"), entry.get("sql", "")) if isinstance(entry, dict) else (None, None)
    if not isinstance(text, str) or not isinstance(gold, str):
        raise ConfigError(f"{where} must be a mapping of q to the question and sql to its query.")
    if not text.strip() or len(text) > MOST_QUESTION_CHARS:
        raise ConfigError(
            f"{where} must have 1 to {MOST_QUESTION_CHARS} characters, not {len(text.strip())}."
        )
    outcome = database.run(gold) if gold else QueryOutcome(rows=())
    if outcome.rows is None:
        raise ConfigError(f"the query of {where} does not run: {outcome.error}.")
    return Question(f"{name}-{number}", name, database, text, gold, outcome.rows)


def drawn(questions: Sequence[Question], count: int, rng: random.Random) -> list[Question]:
    """Return ``count`` questions in random order; none comes again before all have been drawn."""
    found: list[Question] = []
    while len(found) < count:
        found += rng.sample(questions, len(questions))
    return found[:count]
