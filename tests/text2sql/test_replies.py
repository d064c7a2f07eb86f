"""What models say can be read however they say it."""

from __future__ import annotations

import pytest

from hexgen_vllm.text2sql import replies
from hexgen_vllm.text2sql.matching import orders_rows, same_rows

NAMES = {"book": ("id", "title"), "loan": ("id", "due_on")}


@pytest.mark.parametrize(
    ("text", "sql"),
    [
        ("Plan.\n```sql\nSELECT 1;\n```", "SELECT 1"),
        ("```\nSELECT 1\n```\nno:\n```SQL\nSELECT 2\n```", "SELECT 2"),
        ("```sql\nSELECT id\nFROM book", "SELECT id\nFROM book"),
        ("I would say\n  SELECT id FROM book ;", "SELECT id FROM book"),
        ("WITH a AS (SELECT 1) SELECT * FROM a", "WITH a AS (SELECT 1) SELECT * FROM a"),
        ("```sql\nDROP TABLE book\n```", "DROP TABLE book"),
        ("I cannot select anything.", ""),
        ("", ""),
    ],
)
def test_a_query_is_found(text: str, sql: str) -> None:
    assert replies.query(text) == sql


def test_thoughts_are_no_answer() -> None:
    assert replies.without_thought("<think>SELECT 1</think>\nSELECT 2") == "SELECT 2"
    assert replies.without_thought("<think>never ends") == ""
    assert replies.without_thought("half a \ud800 pair") == "half a ? pair"


def test_links_keep_to_the_schema() -> None:
    text = "- `book`: title, book.id, secret\nLOAN\nsqlite_schema: sql\nand that is all: yes"
    assert replies.links(text, NAMES) == {"book": ["id", "title"], "loan": []}
    assert replies.links("no idea", NAMES) == {}


def test_lines_are_cleaned_and_counted() -> None:
    assert replies.lines('- "Dunmore"\n\n* crime\n• 2023\nmore', most=3) == [
        "Dunmore", "crime", "2023",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "passed"),
    [
        ("three rows\nverdict: pass", True),
        ("It would pass, but\nVerdict: FAIL", False),
        ("?", False),
    ],
)
def test_the_last_verdict_counts(text: str, passed: bool) -> None:
    assert replies.passes(text) is passed


@pytest.mark.parametrize(
    ("sql", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY (a + 1) LIMIT 3)", False),
        ("SELECT RANK() OVER (ORDER BY a) FROM t", False),
        ("SELECT a FROM (SELECT b FROM t ORDER BY b) order\nby a", True),
    ],
)
def test_order_counts_where_gold_orders(sql: str, ordered: bool) -> None:
    assert orders_rows(sql) is ordered


@pytest.mark.parametrize(
    ("one", "other", "ordered", "same"),
    [
        ([(1, "a"), (2, "b")], [(2, "b"), (1, "a")], False, True),
        ([(1, "a"), (2, "b")], [(2, "b"), (1, "a")], True, False),
        ([(1,), (1,)], [(1,)], False, False),
        ([(1, 2)], [(2, 1)], False, False),
        ([(0.1 + 0.2,)], [(0.3,)], True, True),
        ([(2,)], [(2.0,)], False, True),
        ([(0.31,)], [(0.3,)], False, False),
        ([(None,)], [(0,)], False, False),
        ([("1",)], [(1,)], False, False),
        ([], [], True, True),
    ],
)
def test_results_match_by_their_rows(
    one: list[tuple[object, ...]], other: list[tuple[object, ...]], ordered: bool, same: bool
) -> None:
    assert same_rows(one, other, ordered=ordered) is same
