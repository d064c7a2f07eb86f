"""Execution match: two results are the same when they hold the same rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Final

from hexgen_vllm.text2sql.outcome import Row

DIGITS: Final = 6  # of a float that count, so that the order of a sum does not matter
_NESTED: Final = re.compile(r"\([^()]*\)")
_ORDER: Final = re.compile(r"\bORDER\s+BY\b", re.IGNORECASE)


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
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, list | dict | set):  # arrays and JSON cannot be counted
        return repr(value)
    return bytes(value) if isinstance(value, bytearray | memoryview) else value
