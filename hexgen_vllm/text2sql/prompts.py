"""The prompts: a fixed text per stage, then the schema, then what belongs to the question.

In that order calls of one stage share a prefix, and those on one database a longer one, which a
prefix cache computes once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from hexgen_vllm.text2sql.outcome import QueryOutcome
from hexgen_vllm.text2sql.schema import Schema

SHOWN_ROWS: Final = 5
_SHOWN_CHARS: Final = 300


class ChatPrompt(NamedTuple):
    """One call: the stage's own text, and what is asked."""

    system: str
    user: str


_KEYWORDS: Final = (
    "You prepare a question for a search in a database. Copy from the question the words that may "
    "be values in the database, such as names, places, categories or states, at most four. "
    "Answer with one of them on each line and nothing else."
)
_LINKS: Final = (
    "You choose the part of a database that a question is about. Answer with one line for each "
    "table that is needed, like 'table: column, column', and nothing else. Name only tables and "
    "columns of the schema. Include the tables that connect the others."
)
_RULES: Final = (
    "Write the plan in one short line. Then write one {product} query that answers the question, "
    "between ```sql and ```. It must be a single SELECT. Return exactly the columns that the "
    "question asks for, in the order in which it names them, and nothing more. Write each column "
    "as table.column, in quotes where the schema has them. Compare text with the values shown in "
    "the schema where there are any."
)
CANDIDATES: Final = (
    f"You turn questions into {{product}} queries by taking the question apart: name its parts, "
    f"answer each with a condition, a join or an aggregate, and put them together. {_RULES}",
    f"You turn questions into {{product}} queries by thinking as the database would: find the "
    f"tables, join them, filter rows, group, keep groups, sort, cut off. {_RULES}",
    f"You turn questions into {{product}} queries by going backwards: say which columns and rows "
    f"the answer has, then which tables they come from, then what is left out. {_RULES}",
)
_REVISE: Final = (
    f"You correct {{product}} queries. You see a question, a query for it and what the database "
    f"said. Find what is wrong: a name that does not exist, a join that is missing, a value "
    f"that is spelled otherwise, a condition that excludes everything. {_RULES}"
)
_UNIT_TEST: Final = (
    "You test answers to questions about a database. Two queries gave different results for the "
    "question below. Write one sentence that is true of the result of a right query and false of "
    "a wrong one. Begin with 'The result'."
)
TEST_ASPECTS: Final = (
    "Think of how many rows and columns there should be.",
    "Think of which values there should be and of their order.",
)
_EVALUATE: Final = (
    "You judge the result of a {product} query against one statement about it. Answer with a short "
    "reason in one line, then with 'verdict: pass' or 'verdict: fail'."
)


def keywords(question: str) -> ChatPrompt:
    """Ask for words of the question that may be values."""
    return ChatPrompt(_KEYWORDS, f"Question: {question}")


def links(schema: Schema, question: str) -> ChatPrompt:
    """Ask for tables and columns."""
    return ChatPrompt(_LINKS, _about(schema, question))


def candidate(product: str, style: int, schema: Schema, question: str) -> ChatPrompt:
    """Ask for a query to ``product``, in one of the styles of :data:`CANDIDATES`."""
    return ChatPrompt(CANDIDATES[style].format(product=product), _about(schema, question))


def revise(
    product: str, schema: Schema, question: str, sql: str, outcome: QueryOutcome
) -> ChatPrompt:
    """Ask for a better query than ``sql``, of which ``outcome`` came."""
    said = f"Query:\n{sql or '(none)'}\nThe database said: {shown(outcome)}"
    return ChatPrompt(_REVISE.format(product=product), f"{_about(schema, question)}\n{said}")


def unit_test(schema: Schema, question: str, queries: Sequence[str], aspect: int) -> ChatPrompt:
    """Ask for one statement that tells the results of ``queries`` apart."""
    listed = "\n".join(f"Query {number}:\n{sql}" for number, sql in enumerate(queries, start=1))
    return ChatPrompt(_UNIT_TEST, f"{_about(schema, question)}\n{listed}\n{TEST_ASPECTS[aspect]}")


def evaluate(
    product: str, question: str, sql: str, outcome: QueryOutcome, statement: str
) -> ChatPrompt:
    """Ask whether ``statement`` is true of ``outcome``."""
    said = f"Question: {question}\nQuery:\n{sql}\nResult: {shown(outcome)}"
    return ChatPrompt(_EVALUATE.format(product=product), f"{said}\nStatement: {statement}")


def shown(outcome: QueryOutcome) -> str:
    """Return an outcome in a few lines: the error, or the number of rows and the first ones."""
    if outcome.rows is None:
        return f"error: {outcome.error}"
    head = f"{len(outcome.rows)} rows of ({', '.join(outcome.columns)})"
    lines = [
        f"({', '.join(map(_shown_value, row))})"[:_SHOWN_CHARS] for row in outcome.rows[:SHOWN_ROWS]
    ]
    return "\n".join([head, *lines])


def _shown_value(value: object) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    return repr(value) if isinstance(value, str) else "NULL" if value is None else str(value)


def _about(schema: Schema, question: str) -> str:
    return f"Schema:\n{schema.text()}\nQuestion: {question}"
