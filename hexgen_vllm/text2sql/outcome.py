"""What a query may use, what came of it, and whether two results are the same."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from math import isnan
from typing import Any, Final

Row = tuple[Any, ...]
DIGITS: Final = 6  # of a float that count, so that the order of a sum does not matter
_NESTED: Final = re.compile(r"\([^()]*\)")
_ORDER: Final = re.compile(r"\bORDER\s+BY\b", re.IGNORECASE)


@dataclass(frozen=True)
class QueryLimits:
    """What a query may use: seconds, rows of the result, bytes of query, value and result."""

    time_s: float = 2.0
    rows: int = 1000
    sql_bytes: int = 20_000
    value_bytes: int = 100_000
    result_bytes: int = 1_000_000


@dataclass(frozen=True)
class QueryOutcome:
    """What came of a query.

    Attributes:
        columns: names of the result's columns.
        rows: the result, ``None`` when there is none.
        error: why there is none, in one sentence.
        refused: whether that is because it may not run.
    """

    columns: tuple[str, ...] = ()
    rows: tuple[Row, ...] | None = None
    error: str | None = None
    refused: bool = False

    @property
    def is_telling(self) -> bool:
        """Whether there is a row with a value: an answer that may be right."""
        return any(value is not None for row in self.rows or () for value in row)


def refusal(why: str) -> QueryOutcome:
    """Return the outcome of a query that may not run."""
    return QueryOutcome(error=f"refused: {why}", refused=True)


def failure(said: object) -> QueryOutcome:
    """Return the outcome of a query that is wrong; a database says so in one line or many."""
    return QueryOutcome(error=" ".join(str(said).split())[:500])


class Result:
    """Rows of one result, taken as long as they are within the limits."""

    def __init__(self, columns: tuple[str, ...], limits: QueryLimits) -> None:
        self._columns = columns
        self._limits = limits
        self._rows: list[Row] = []
        self._bytes = 0

    def take(self, row: Row) -> str | None:
        """Take one more row; returns why it is one too many, ``None`` when it is not."""
        if len(self._rows) == self._limits.rows:
            return f"the result has more than {self._limits.rows} rows"
        self._bytes += sum(map(_size, row))
        if self._bytes > self._limits.result_bytes:
            return f"the result is larger than {self._limits.result_bytes} bytes"
        self._rows.append(tuple(row))
        return None

    def outcome(self) -> QueryOutcome:
        """Return what was taken."""
        return QueryOutcome(self._columns, tuple(self._rows))


def _size(value: Any) -> int:
    if isinstance(value, str | bytes | bytearray | memoryview):
        return len(value)
    return len(str(value)) if isinstance(value, list | dict | tuple) else 8


def orders_rows(sql: str) -> bool:
    """Return whether the result of ``sql`` has an order: ``ORDER BY`` outside parentheses."""
    while (flat := _NESTED.sub(" ", sql)) != sql:
        sql = flat
    return _ORDER.search(sql) is not None


def same_rows(one: Sequence[Row], other: Sequence[Row], *, ordered: bool) -> bool:
    """Return whether two results hold the same rows as often, in the same order if ``ordered``.

    Column names do not count, the order of columns does. Of floats :data:`DIGITS` digits count.
    """
    left, right = [_plain(row) for row in one], [_plain(row) for row in other]
    return left == right if ordered else Counter(left) == Counter(right)


def _plain(row: Row) -> Row:
    return tuple(map(_value, row))


def _value(value: Any) -> Any:
    if isinstance(value, float | Decimal):
        if isnan(value):  # which is equal to nothing
            return "NaN"
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, list | dict | set):  # arrays and JSON cannot be counted
        return repr(value)
    return bytes(value) if isinstance(value, bytearray | memoryview) else value
