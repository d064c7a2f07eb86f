"""Databases are large enough and the same everywhere; every question has an answer."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from examples.text2sql.databases import SOURCES, build
from examples.text2sql.main import FILE
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.text2sql.database import Database
from hexgen_vllm.text2sql.questions import drawn, load

QUESTIONS = yaml.safe_load(FILE.read_text())


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


@pytest.mark.parametrize("name", SOURCES)
def test_the_same_seed_gives_the_same_rows(
    name: str, paths: Mapping[str, Path], tmp_path: Path
) -> None:
    assert dump(build(name, tmp_path / "again.sqlite")) == dump(paths[name])
    assert dump(build(name, tmp_path / "other.sqlite", seed=1)) != dump(paths[name])


def test_there_are_three_schemas_and_some_thousand_rows(databases: Mapping[str, Database]) -> None:
    rows = 0
    for database in databases.values():
        schema = database.schema()
        assert sum(bool(c.references) for table in schema.tables for c in table.columns) >= 5
        for table in schema.names():
            ((count,),) = database.run(f"SELECT COUNT(*) FROM {table}").rows or ()
            rows += count
    assert (len(databases), rows > 5000) == (3, True)


@pytest.mark.parametrize("name", SOURCES)
def test_every_gold_query_returns_rows_and_matches_itself(
    name: str, databases: Mapping[str, Database]
) -> None:
    found = [question for question in load(databases, FILE) if question.name == name]
    assert len(found) == len({question.text for question in found}) >= 12
    for question in found:
        assert any(value is not None for row in question.rows for value in row), question.gold
        assert question.is_matched_by(question.rows)
        assert not question.is_matched_by((*question.rows, question.rows[0]))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "shop: [{q: What, sql: SELECT colour FROM product}]",
            "the query of question 1 of shop does not run: no such column: colour.",
        ),
        ("shop: [{sql: SELECT 1}]", "question 1 of shop must be a mapping of q to the question"),
        ("shop: [What]", "question 1 of shop must be a mapping of q to the question"),
        ("shop: []", "questions.yaml holds no question."),
        ("bank: []", "unknown database 'bank'; known are library, clinic, shop."),
        ("- q: What", "questions.yaml must be a mapping of databases to lists of questions."),
        ("{", "questions.yaml line 1: not YAML"),
    ],
)
def test_a_file_that_holds_no_questions_is_an_error(
    text: str, sentence: str, databases: Mapping[str, Database], tmp_path: Path
) -> None:
    file = tmp_path / "questions.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(sentence)) as raised:
        load(databases, file)
    assert "\n" not in str(raised.value)


def test_a_question_without_a_gold_query_is_matched_by_nothing(
    databases: Mapping[str, Database], tmp_path: Path
) -> None:
    file = tmp_path / "questions.yaml"
    file.write_text("shop:\n- q: What is there?")
    (question,) = load(databases, file)
    assert not question.is_matched_by(())


def test_nobody_asks_a_question_again_before_all_were_asked(
    databases: Mapping[str, Database],
) -> None:
    import random

    known = load(databases, FILE)
    asked = drawn(known, len(known) + 5, random.Random(1))
    assert len({question.id for question in asked[: len(known)]}) == len(known)
    assert asked[:5] != known[:5]


def test_a_schema_says_what_a_model_needs(databases: Mapping[str, Database]) -> None:
    schema = databases["library"].schema().only({"book": ["title"], "nothing": ["x"]})
    schema = schema.with_values({("book", "title"): ["The Lost Road"]})
    assert schema.text() == (
        "book:\n  id INTEGER\n  title TEXT e.g. 'The Lost Road'\n  author_id INTEGER -> author.id"
    )


def test_values_are_found_and_words_are_never_sql(databases: Mapping[str, Database]) -> None:
    schema = databases["clinic"].schema()
    words = ["eastport", "'; DROP TABLE visit --", "%", "ab"]
    found = databases["clinic"].find_values(schema, words)
    assert found == {("patient", "city"): ("Eastport",)}
