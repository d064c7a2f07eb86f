"""Whatever a grammar derives is finite, can be read, and as a query can be run."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from typing import Any

import pytest

from hexgen_vllm.text2sql import grammar, replies
from hexgen_vllm.text2sql.database import Database
from hexgen_vllm.text2sql.grammar import ROOT, Chars, Grammar, Rule
from hexgen_vllm.text2sql.schema import Column, Schema, Table
from hexgen_vllm.text2sql.sql_grammar import query_grammar

NAMES = ("library", "clinic", "shop")
QUESTION = "How many members live in Dunmore, and who?"


def derived(found: Grammar, rng: random.Random, name: str = ROOT) -> str:
    """Return a random answer of a grammar."""
    return "".join(_derived(found, rng, part) for part in rng.choice(found.rules[name]))


def _derived(found: Grammar, rng: random.Random, part: Any) -> str:
    if isinstance(part, Rule):
        return derived(found, rng, part.name)
    if isinstance(part, Chars):
        among = re.sub(r"(.)-(.)", lambda m: "".join(map(chr, range(ord(m[1]), ord(m[2]) + 1))),
                       part.among)  # fmt: skip
        return "".join(rng.choices(among, k=rng.randint(part.least, part.most)))
    return str(part)


def spelled(schema: Schema) -> Schema:
    """Return ``schema`` with values that need care."""
    table = next(t for t in schema.tables if any(c.is_text for c in t.columns))
    column = next(c for c in table.columns if c.is_text)
    return schema.with_values({(table.name, column.name): ["O'Hara", 'say "x"', "back\\slash"]})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("linked", [True, False])
def test_every_query_runs(name: str, linked: bool, databases: Mapping[str, Database]) -> None:
    schema = databases[name].schema()
    first = {table.name: ["name", "title", "city"] for table in schema.tables[:3]}
    schema = spelled(schema.only(first if linked else {}))
    found, rng, sandbox = query_grammar(schema), random.Random(name), databases[name]
    seen = set()
    for _ in range(150):
        text = derived(found, rng)
        outcome = sandbox.run(replies.query(text))
        assert outcome.rows is not None or "more than 1000 rows" in (outcome.error or ""), text
        seen.update(re.findall(r"JOIN|WHERE|GROUP BY|HAVING|ORDER BY|LIMIT|LIKE|O''Hara", text))
    assert len(seen) == 8, seen


def test_a_schema_of_text_or_of_numbers_only_has_queries_too() -> None:
    for kind in ("TEXT", "INTEGER"):
        found = query_grammar(Schema((Table("t", (Column("c", kind),)),)))
        used = {p.name for alternatives in found.rules.values() for parts in alternatives
                for p in parts if isinstance(p, Rule)}  # fmt: skip
        assert used <= set(found.rules)
        assert "t.c" in derived(found, random.Random(0), "column-0")


def test_keywords_are_words_of_the_question() -> None:
    found, rng = grammar.keywords(QUESTION), random.Random(3)
    for _ in range(30):
        assert set(replies.lines(derived(found, rng), most=9)) <= {
            "How", "many", "members", "live", "Dunmore", "and", "who",
        }  # fmt: skip
    assert derived(grammar.keywords("?"), rng).startswith("none")


def test_links_name_tables_and_columns(databases: Mapping[str, Database]) -> None:
    names = databases["shop"].schema().names()
    found, rng = grammar.links(names), random.Random(5)
    for _ in range(30):
        text = derived(found, rng)
        linked = replies.links(text, names)
        assert 1 <= len(linked) <= 4
        assert all(linked.values()), text


def test_verdicts_can_be_read() -> None:
    rng = random.Random(7)
    said = [derived(grammar.verdict(), rng) for _ in range(20)]
    assert {replies.passes(text) for text in said} == {True, False}
    assert derived(grammar.unit_test(), rng).startswith("The result ")


def test_the_request_is_what_vllm_reads() -> None:
    body = Grammar({ROOT: (('a\n"\\', Chars("0-9", 1, 3)), (), (Rule("b"),)), "b": (("c",),)})
    assert body.extra_body() == {
        "structured_outputs": {"grammar": 'root ::= "a\\n\\"\\\\" [0-9]{1,3} | "" | b\nb ::= "c"'}
    }
    json.dumps(body.extra_body())


@pytest.mark.engine
@pytest.mark.parametrize("name", NAMES)
def test_xgrammar_reads_the_same_grammar(name: str, databases: Mapping[str, Database]) -> None:
    import xgrammar
    from xgrammar.testing import _is_grammar_accept_string

    schema = databases[name].schema()
    rng = random.Random(name)
    for found in (
        query_grammar(spelled(schema)),
        grammar.links(schema.names()),
        grammar.keywords(QUESTION),
        grammar.unit_test(),
        grammar.verdict(),
    ):
        compiled = xgrammar.Grammar.from_ebnf(found.ebnf())
        for _ in range(5):
            text = derived(found, rng)
            assert _is_grammar_accept_string(compiled, text), text
            assert not _is_grammar_accept_string(compiled, f"{text}; DROP TABLE x")


@pytest.mark.engine
@pytest.mark.parametrize(
    "sql",
    [
        "SELECT book.genre\nFROM book\nGROUP BY 1\nHAVING COUNT(*) > 30",
        "SELECT book.title\nFROM book JOIN copy ON copy.book_id = book.id\nGROUP BY 1\n"
        "HAVING COUNT(*) = 4",
        "SELECT book.title\nFROM book\nWHERE book.id NOT IN (SELECT copy.book_id FROM copy)",
        "SELECT COUNT(*)\nFROM author\nWHERE author.id NOT IN (SELECT book.author_id FROM book)",
        "SELECT COUNT(*)\nFROM loan\nWHERE loan.returned_on > loan.due_on",
    ],
)
def test_what_people_often_ask_has_a_query(sql: str, databases: Mapping[str, Database]) -> None:
    import xgrammar
    from xgrammar.testing import _is_grammar_accept_string

    compiled = xgrammar.Grammar.from_ebnf(query_grammar(databases["library"].schema()).ebnf())
    assert _is_grammar_accept_string(compiled, f"plan\n```sql\n{sql}\n```")
    assert databases["library"].run(sql).rows is not None
