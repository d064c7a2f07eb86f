"""BIRD and Spider: their questions, their files of predictions, and how they count a match.

A user has the folder as it is published; it is found out which of the two it is.

| | BIRD | Spider |
|---|---|---|
| questions | ``dev.json``: ``question``, ``evidence``, ``SQL``, ``db_id`` | ``dev.json``: ``question``, ``query``, ``db_id`` |
| databases | ``dev_databases/ID/ID.sqlite`` | ``database/ID/ID.sqlite`` |
| predictions | ``predict_dev.json``: ``"0": "SQL\\t----- bird -----\\tID"`` | ``predict_dev.txt``: a query on each line |
| match | the sets of rows are equal | rows are equal as often, columns in any order, in order where gold has ``ORDER BY``; ``DISTINCT`` does not count |

Sources: ``evaluation.py`` of https://github.com/AlibabaResearch/DAMO-ConvAI (bird), ``exec_eval.py`` of
https://github.com/taoyds/test-suite-sql-eval.
"""  # noqa: E501 - a table

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import sqlglot

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.text2sql.database import Database
from hexgen_vllm.text2sql.outcome import QueryLimits, Row
from hexgen_vllm.text2sql.questions import Question
from hexgen_vllm.wire import from_json

BIRD: Final = "bird"
SPIDER: Final = "spider"
LIMITS: Final = QueryLimits(
    time_s=30.0, rows=1_000_000, value_bytes=10_000_000, result_bytes=500_000_000
)
"""What a query may use: the time is that of BIRD's evaluator."""
_GOLD: Final = {BIRD: "SQL", SPIDER: "query"}
_FILES: Final = {
    BIRD: ("{split}.json", "mini_{split}_sqlite.json"),
    SPIDER: ("{split}.json", "{split}_spider.json"),
}
_FOLDERS: Final = (
    "{split}_databases", "database", "{split}_database", "test_database",
    "{split}_databases/{split}_databases", "databases",
)  # fmt: skip
_SEPARATOR: Final = "\t----- bird -----\t"


@dataclass(frozen=True)
class BenchmarkQuestion(Question):
    """A question of a benchmark, whose gold query is run when an answer is compared with it.

    Attributes:
        kind: ``bird`` or ``spider``, whose rules count.
    """

    kind: str = BIRD
    _known: dict[str, tuple[Row, ...] | None] = field(default_factory=dict, compare=False)

    def is_matched_by(self, rows: Sequence[Row] | None, sql: str = "") -> bool:
        """Return whether the evaluator of the benchmark counts an answer as right."""
        if rows is None:
            return False
        if self.kind == BIRD:
            gold = self._rows_of(self.gold)
            return gold is not None and {*map(_plain, rows)} == {*map(_plain, gold)}
        said, gold = (
            self._rows_of(without_distinct(sql)),
            self._rows_of(without_distinct(self.gold)),
        )
        if said is None or gold is None:
            return False
        return same_columns(said, gold, ordered="order by" in self.gold.lower())

    def _rows_of(self, sql: str) -> tuple[Row, ...] | None:
        if sql not in self._known:
            self._known[sql] = self.database.run(sql).rows
        return self._known[sql]


@dataclass(frozen=True)
class Benchmark:
    """The questions of one folder.

    Attributes:
        kind: ``bird`` or ``spider``.
        split: which questions, as ``dev``.
        questions: in the order of the file.
    """

    kind: str
    split: str
    questions: Sequence[BenchmarkQuestion]

    @property
    def file_name(self) -> str:
        """What a file of predictions is called."""
        return f"predict_{self.split}.{'json' if self.kind == BIRD else 'txt'}"

    def write(self, path: Path, predictions: Mapping[str, str]) -> None:
        """Write a file of predictions that the benchmark's own evaluator reads.

        Args:
            path: the file; there may be one already.
            predictions: queries by the id of their question; what lacks counts as wrong.
        """
        found = [(one, " ".join(predictions.get(one.id, "").split())) for one in self.questions]
        if self.kind == BIRD:
            told = {str(number): f"{sql}{_SEPARATOR}{one.name}" for number, (one, sql) in
                    enumerate(found)}  # fmt: skip
            text = json.dumps(told, indent=4)
        else:  # a line without a query would be left out, and all that follow be moved
            text = "\n".join(sql or "SELECT 1" for _, sql in found) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


@contextmanager
def opened(folder: Path, split: str, most: int = 0) -> Iterator[Benchmark]:
    """Open the questions of a folder and their databases, for as long as the context lasts.

    Args:
        folder: of BIRD or Spider, as it is published and unpacked.
        split: which questions, as ``dev``.
        most: at most so many, of those that come first; 0 is all.

    Raises:
        ConfigError: it is no such folder, or a database cannot be read.
    """
    kind, entries = _entries(folder, split)
    databases: dict[str, Database] = {}
    try:
        chosen = entries[: most or None]
        places = [folder / name.format(split=split) for name in _FOLDERS]
        for entry in chosen:
            name = entry["db_id"]
            if name not in databases:
                databases[name] = Database.open(_file(places, name), LIMITS)
        yield Benchmark(
            kind,
            split,
            [
                BenchmarkQuestion(
                    f"{split}-{number}", entry["db_id"], databases[entry["db_id"]],
                    _text(entry), entry[_GOLD[kind]], kind=kind,
                )
                for number, entry in enumerate(chosen)
            ],
        )  # fmt: skip
    finally:
        for database in databases.values():
            database.close()


def _entries(folder: Path, split: str) -> tuple[str, list[dict[str, Any]]]:
    names = [name.format(split=split) for names in _FILES.values() for name in names]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise ConfigError(f"benchmark: {folder} has none of {', '.join(dict.fromkeys(names))}.")
    try:
        found = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"benchmark: {path} cannot be read: {error}.") from None
    for kind, gold in _GOLD.items():
        if isinstance(found, list) and found and all(
            isinstance(entry, dict)
            and all(isinstance(entry.get(name), str) for name in ("question", "db_id", gold))
            for entry in found
        ):  # fmt: skip
            return kind, found
    raise ConfigError(f"benchmark: {path} is neither of BIRD nor of Spider.")


def _file(places: Sequence[Path], name: str) -> Path:
    for place in places:
        for path in (place / name / f"{name}.sqlite", place / name / f"{name}.db"):
            if path.is_file():
                return path
    looked = ", ".join(dict.fromkeys(str(place.name) for place in places))
    raise ConfigError(f"benchmark: the database {name} is in none of the folders {looked}.")


def _text(entry: Mapping[str, Any]) -> str:
    evidence = str(entry.get("evidence") or "").strip()
    return f"{entry['question']} (Hint: {evidence})" if evidence else str(entry["question"])


def without_distinct(sql: str) -> str:
    """Return ``sql`` without the word ``DISTINCT``, which Spider's evaluator does not count."""
    try:
        tokens = sqlglot.tokenize(sql, read="sqlite")
    except sqlglot.errors.SqlglotError:
        return sql
    for token in reversed(tokens):
        if token.token_type is sqlglot.TokenType.DISTINCT:
            sql = sql[: token.start] + sql[token.end + 1 :]
    return sql


def same_columns(one: Sequence[Row], other: Sequence[Row], *, ordered: bool) -> bool:
    """Return whether two results are the same when columns may stand in any order.

    Rows count as often as they come, and in their order if ``ordered``.
    """
    left, right = [*map(_plain, one)], [*map(_plain, other)]
    if not left and not right:
        return True
    if len(left) != len(right) or len(left[0]) != len(right[0]):
        return False
    columns = [Counter(row[i] for row in left) for i in range(len(left[0]))]
    fits = [[i for i, has in enumerate(columns) if has == Counter(row[j] for row in right)]
            for j in range(len(right[0]))]  # fmt: skip
    for order in _orders(fits, ()):
        moved = [tuple(row[i] for i in order) for row in left]
        if moved == right if ordered else Counter(moved) == Counter(right):
            return True
    return False


def _orders(fits: Sequence[Sequence[int]], taken: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield the orders in which each column is one that fits."""
    if len(taken) == len(fits):
        yield taken
        return
    for i in fits[len(taken)]:
        if i not in taken:
            yield from _orders(fits, (*taken, i))


def _plain(row: Row) -> Row:
    """Return a row as one that can be counted."""
    return tuple(repr(v) if isinstance(v, list | dict) else v for v in row)
