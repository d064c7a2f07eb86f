"""What models say can be read however they say it."""

from __future__ import annotations

import pytest

from hexgen_vllm.text2sql import replies
from hexgen_vllm.text2sql.gate import Gate
from hexgen_vllm.text2sql.outcome import orders_rows, same_rows

NAMES = {"book": ("id", "title"), "loan": ("id", "due_on")}


SHAPES = {
    # fences of every kind
    "sql fence": "Plan.\n```sql\nSELECT 1;\n```",
    "no label": "```\nSELECT 1\n```",
    "capital label": "```SQL\nSELECT 1\n```",
    "sqlite label": "```sqlite\nSELECT 1\n```",
    "postgresql label": "```postgresql\nSELECT 1\n```",
    "duckdb label": "```duckdb\nSELECT 1;\n```",
    "mysql label": "```mysql\nSELECT 1\n```",
    "label with words": '```sql title="query"\nSELECT 1\n```',
    "label behind a space": "``` sql\nSELECT 1\n```",
    "tildes": "~~~sql\nSELECT 1\n~~~",
    "four backticks": "````sql\nSELECT 1\n````",
    "one line": "```sql SELECT 1```",
    "one line without label": "```SELECT 1;```",
    "label on its own line": "```\nsql\nSELECT 1\n```",
    "indented": "  ```sql\n  SELECT 1\n  ```",
    "in a list": "1. Here it is:\n   ```sql\n   SELECT 1\n   ```",
    "never closed": "```sql\nSELECT 1",
    "never opened": "SELECT 1\n```",
    "closed on the line": "```sql\nSELECT 1;```",
    "fence behind words": "The query: ```sql\nSELECT 1\n``` does it.",
    "in a quote": "> SELECT 1",
    "quotes in a fence": '```sql\n"""\nSELECT 1\n"""\n```',
    "CDATA": "```xml\n<sql><![CDATA[SELECT 1]]></sql>\n```",
    # lines, spaces, signs
    "CRLF": "Plan.\r\n```sql\r\nSELECT 1;\r\n```\r\nDone.\r\n",
    "carriage returns only": "```sql\rSELECT 1\r```",
    "no-break spaces": "```sql\nSELECT\u00a01\n```",
    "zero width": "\ufeff```sql\n\u200bSELECT 1\n```",
    "wide semicolon": "SELECT 1；",
    "entities": "<sql>SELECT &#49;</sql>",
    "blank lines": "\n\n\n```sql\n\n\nSELECT 1\n\n\n```\n\n\n",
    # prose around
    "prose before": "Sure! Here is the SQL query that you asked for:\n\nSELECT 1",
    "prose behind": "SELECT 1\n\nThis query returns the number one.",
    "prose behind a semicolon": "SELECT 1; This returns one.",
    "prose on both sides": "With this query you get it.\n\nSELECT 1;\n\nI hope that this helps!",
    "label before": "SQL: SELECT 1",
    "bold label": "**SQL Query:** SELECT 1",
    "answer label": "Final answer: SELECT 1;",
    "heading": "### SQL\nSELECT 1",
    "inline code": "You can use `SELECT 1` for that.",
    "inline code with a semicolon": "Answer: `SELECT 1;`",
    "numbered": "1. SELECT 1",
    "bullet": "- SELECT 1",
    "prompt of sqlite": "sqlite> SELECT 1;",
    "prompt of psql": "postgres=# SELECT 1;",
    "fence with a prompt": "```\nsqlite> SELECT 1;\n```",
    "notes behind": "```sql\nSELECT 1\n```\n\n**Notes:**\n- It is fast.\n- It is right.",
    "apology": "I am sorry for the mistake. Corrected:\n```sql\nSELECT 1\n```\nLet me know!",
    # result blocks, other blocks, several
    "result behind": "```sql\nSELECT 1\n```\nResult:\n```\n| 1 |\n|---|\n| 1 |\n```",
    "output behind": "```sql\nSELECT 1\n```\n```text\n1\n```",
    "JSON result behind": '```sql\nSELECT 1\n```\n```json\n[{"n": 1}]\n```',
    "schema before": "```sql\nCREATE TABLE t (a INT);\n```\n```sql\nSELECT 1\n```",
    "last of two": "```sql\nSELECT 2\n```\nBetter:\n```sql\nSELECT 1\n```",
    "python block": '```python\ncursor.execute("SELECT 1")\n```',
    "python with three quotes": "```python\nq = '''SELECT 1'''\n```",
    "bash block": "```bash\nsqlite3 x.db 'SELECT 1'\n```",
    # thoughts
    "thought": "<think>SELECT 2?</think>\nSELECT 1",
    "thought with a fence": "<think>\n```sql\nSELECT 2\n```\n</think>\n```sql\nSELECT 1\n```",
    "thought never opened": "I think SELECT 2 is\n```sql\nSELECT 2\n```\n</think>\nSELECT 1",
    "two thoughts": "<think>a</think>SELECT 2<think>b</think>\n\n```sql\nSELECT 1\n```",
    "thinking": "<thinking>SELECT 2</thinking>```sql\nSELECT 1\n```",
    "reasoning": "<reasoning>it is 2</reasoning>\n<answer>SELECT 1</answer>",
    "brackets": "[THINK]SELECT 2[/THINK]SELECT 1",
    "channels": "<|channel|>analysis<|message|>SELECT 2<|end|><|start|>assistant"
    "<|channel|>final<|message|>SELECT 1",
    "end of turn": "SELECT 1<|im_end|>",
    "end of text": "```sql\nSELECT 1\n```</s>",
    # JSON, tags, tools
    "JSON": '{"sql": "SELECT 1"}',
    "JSON with reasons": '{"reasoning": "select one", "query": "SELECT 1;"}',
    "JSON in a fence": '```json\n{"sql": "SELECT 1"}\n```',
    "JSON behind words": 'Here: {"SQL": "SELECT 1"} as asked.',
    "JSON with line breaks": '{"sql": "SELECT\n1"}',
    "JSON with escaped breaks": '{"sql": "SELECT\\n1"}',
    "JSON list": '[{"sql": "SELECT 2"}, {"sql": "SELECT 1"}]',
    "tool call": '{"name": "run_sql", "arguments": {"query": "SELECT 1"}}',
    "tool call in text": '<tool_call>{"name": "q", "arguments": "{\\"sql\\": \\"SELECT 1\\"}"}'
    "</tool_call>",
    "JSON around a fence": '{"answer": "```sql\\nSELECT 1\\n```"}',
    "XML": "<sql>SELECT 1</sql>",
    "XML with lines": "<answer>\n<sql>\nSELECT 1;\n</sql>\n</answer>",
    "query tag": "<query>SELECT 1</query>",
    "JSON of an agent": '{"action": "Final Answer", "action_input": "SELECT 1"}',
    "action input in quotes": 'Thought: one.\nAction: query\nAction Input: "SELECT 1"',
    # in quotes, in the middle of a line
    "quotes": '"SELECT 1"',
    "assignment": "query = 'SELECT 1'",
    "three quotes": '"""SELECT 1"""',
    "box": "\\boxed{SELECT 1}",
    "label in a list": "* **Query**: SELECT 1",
    "label with an apostrophe": "I'd use: SELECT 1",
    "other brackets": "◁think▷SELECT 2◁/think▷SELECT 1",
    "thought with a name before it": "<seed:think>SELECT 2</seed:think>SELECT 1",
    "thought with a long tag": "<|begin_of_thought|>SELECT 2<|end_of_thought|>\nSELECT 1",
    # semicolons, comments, several statements
    "semicolons": "SELECT 1;;;",
    "semicolon on its line": "```sql\nSELECT 1\n;\n```",
    "several queries": "```sql\nSELECT 2;\nSELECT 1;\n```",
    "several queries without a fence": "SELECT 2;\nSELECT 1;",
    "small letters": "select 1",
    "spread": "SELECT\n    1",
}
"""How models say ``SELECT 1``."""
EXACT = (
    ("I would say\n  SELECT id FROM book ;", "SELECT id FROM book"),
    ("```sql\nSELECT id\nFROM book", "SELECT id\nFROM book"),
    ("```sql\n-- the number\nSELECT 1 -- one\n```", "-- the number\nSELECT 1 -- one"),
    ("WITH a AS (SELECT 1) SELECT * FROM a", "WITH a AS (SELECT 1) SELECT * FROM a"),
    (
        "WITH a AS (\n  SELECT 1\n)\n\nSELECT * FROM a\n\nDone.",
        "WITH a AS (\n  SELECT 1\n)\n\nSELECT * FROM a",
    ),
    ("(SELECT 1) UNION (SELECT 2)", "(SELECT 1) UNION (SELECT 2)"),
    ("VALUES (1)", "VALUES (1)"),
    ("SELECT ';' AS s; and that is it", "SELECT ';' AS s"),
    ("SELECT '```' AS s", "SELECT '```' AS s"),
    ("SELECT a &lt; 3 FROM t", "SELECT a < 3 FROM t"),
    ("SELECT 'a\n\nb' AS x", "SELECT 'a\n\nb' AS x"),
    (
        "SELECT COUNT(*)\nFROM book\nWHERE x = 1\nThe result is a number.",
        "SELECT COUNT(*)\nFROM book\nWHERE x = 1",
    ),
    ("SELECT naem FORM book", ""),
    ("SELECT x FROM (SELECT y FROM t", "SELECT x FROM (SELECT y FROM t"),
    # what writes is left whole, so that it is refused, and never turned into what reads
    ("```sql\nDROP TABLE book\n```", "DROP TABLE book"),
    ("```sql\nSELECT 1; DROP TABLE book;\n```", "SELECT 1; DROP TABLE book"),
    ("```sql\nDELETE FROM book; SELECT 1\n```", "DELETE FROM book; SELECT 1"),
    ("```sql\nINSERT INTO book VALUES (1);\n```", "INSERT INTO book VALUES (1)"),
    ("The SQL is select id from book", "select id from book"),
    ("SELECT id FROM book\n\n- `SELECT id` takes ids", "SELECT id FROM book"),
    ("INSERT INTO new SELECT id FROM book", ""),
    ("Please run: delete from book where id in (select id from loan)", ""),
    # nothing there
    ("I cannot select anything.", ""),
    ("Select the best answer from the list.", ""),
    ("With pleasure!", ""),
    ("<think>SELECT 1", ""),
    ('{"error": "no idea"}', ""),
    ("```\n```", ""),
    ("", ""),
)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_query_is_found_however_it_is_said(shape: str) -> None:
    found = replies.query(replies.without_thought(SHAPES[shape]))
    assert " ".join(found.split()).upper() == "SELECT 1"


@pytest.mark.parametrize(("text", "sql"), EXACT)
def test_a_query_is_found_whole(text: str, sql: str) -> None:
    assert replies.query(replies.without_thought(text)) == sql


def test_there_are_many_shapes() -> None:
    assert len(SHAPES) + len(EXACT) >= 60


def test_an_answer_without_end_does_not_take_for_ever() -> None:
    assert replies.query("SELECT a FROM b WHERE " + "x = 1 AND\n" * 300) != ""
    assert replies.query("{" * 20_000) == ""
    assert replies.query("`" * 20_000) == ""
    assert replies.query("SELECT " + "(" * 20_000) == ""


def test_a_model_that_repeats_itself_is_read_once() -> None:
    """Read from each word to the end, it would take a quarter of an hour."""
    assert replies.query("select " * 150_000) == ""


@pytest.mark.parametrize("end", [")", "'", "SELECT a FROM t WHERE ("])
def test_many_comments_are_read_in_one_way(end: str) -> None:
    """Doubled for each comment, the time would not end."""
    sql = "/* a */" * 100 + end
    replies.query(f"```sql\n{sql}\n```")
    assert Gate("sqlite", ["t"]).objection(sql) is not None


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
        ([(float("nan"),)], [(float("nan"),)], False, True),
        ([("1",)], [(1,)], False, False),
        ([], [], True, True),
    ],
)
def test_results_match_by_their_rows(
    one: list[tuple[object, ...]], other: list[tuple[object, ...]], ordered: bool, same: bool
) -> None:
    assert same_rows(one, other, ordered=ordered) is same
