"""What the demo's model is trained on, and that it is not what it is asked."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import yaml

from examples.text2sql.main import FILE, UNSEEN_FILE
from examples.text2sql.options import MODEL
from examples.text2sql.train import model, schemas, stages, trainer
from examples.text2sql.train.pairs import Pair, draw
from examples.text2sql.train.schemas import Source, made_up
from examples.text2sql.train.trainer import Examples, normal, withheld
from hexgen_vllm.text2sql import prompts, replies
from hexgen_vllm.text2sql.database import Database
from hexgen_vllm.text2sql.outcome import QueryOutcome

ASKED = [entry["q"] for entries in yaml.safe_load(FILE.read_text()).values() for entry in entries]
SEEDS = (0, 1, 2, 3, 4, 5, 6)
"""Seeds of the runs that made the model."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Source]:
    return schemas.demo(tmp_path_factory.mktemp("demo"))


@pytest.mark.parametrize(
    "spelled", [str, str.upper, lambda text: text.replace(" ", "  ").rstrip("?.") + " !"]
)
def test_a_question_that_is_asked_is_never_trained_on(
    spelled: object, sources: Sequence[Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(spelled)
    pair = draw(sources[0], random.Random(0))
    drawn = iter([*(replace(pair, question=spelled(text)) for text in ASKED), pair] * 100)
    monkeypatch.setattr(trainer, "draw", lambda *_: next(drawn))
    assert {one.question for one in islice(Examples(0).pairs(), 20)} == {pair.question}


def test_the_training_set_does_not_have_them() -> None:
    asked = {normal(text) for text in ASKED}
    assert len(asked) == 48
    assert asked <= withheld(FILE)
    for seed in SEEDS:
        found = [normal(pair.question) for pair in islice(Examples(seed).pairs(), 1500)]
        assert not asked & set(found)
        assert len(set(found)) > 1300, "they differ"


def test_schemas_that_count_as_unseen_are_not_drawn() -> None:
    names = set(yaml.safe_load(UNSEEN_FILE.read_text()))
    assert names.isdisjoint(one.name for one in schemas.said.DEMO)


def pairs(sources: Sequence[Source], count: int) -> Iterator[Pair]:
    rng = random.Random("tests")
    for number in range(count):
        yield draw(sources[number % len(sources)], rng)


def test_every_query_of_a_pair_runs(
    sources: Sequence[Source], databases: Mapping[str, Database]
) -> None:
    kinds = set()
    for pair in pairs(sources, 400):
        found = databases[pair.source.said.name].run(pair.sql)
        assert found.rows is not None or "more than 1000 rows" in (found.error or ""), pair
        assert len(found.columns) in (len(pair.outputs), 0), pair
        assert pair.most is None or len(found.rows or ()) <= pair.most, pair
        kinds.add(pair.sql.count("JOIN"))
    assert kinds >= {0, 1, 2}


def test_what_a_prompt_shows_of_values_is_what_the_agent_finds(
    sources: Sequence[Source], databases: Mapping[str, Database]
) -> None:
    for pair in pairs(sources, 60):
        database = databases[pair.source.said.name]
        words = list(pair.words)
        assert pair.source.schema == database.schema()
        assert pair.source.find(words) == database.find_values(database.schema(), words), words


def test_answers_can_be_read(sources: Sequence[Source]) -> None:
    rng = random.Random(1)
    for pair in [*pairs(sources, 60), *(draw(made_up(rng), rng) for _ in range(60))]:
        names = pair.source.schema.names()
        linked = replies.links(stages.linking(pair).answer, names)
        assert set(linked) == set(pair.tables)
        assert all(set(columns) <= set(linked[table]) for table, columns in pair.columns.items())
        for style in range(len(prompts.CANDIDATES)):
            assert replies.query(stages.writing(pair, style, rng).answer) == pair.sql
        assert replies.query(stages.revising(pair, rng).answer) == pair.sql
        said = replies.lines(stages.keywords(pair).answer, most=4)
        assert all(word in pair.question or word == pair.noun for word in said)
        assert stages.testing(pair, rng).answer.startswith("The result has ")
        assert "verdict: " in stages.judging(pair, rng).answer


def test_the_template_says_every_stage_in_one_token(sources: Sequence[Source]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert tokenizer.chat_template == model.CHAT_TEMPLATE
    schema, outcome = sources[0].schema, QueryOutcome(("a",), ((1,),))
    asked = [
        prompts.keywords("Who?"), prompts.links(schema, "Who?"),
        *(prompts.candidate("SQLite", style, schema, "Who?") for style in range(3)),
        prompts.revise("SQLite", schema, "Who?", "SELECT 1", outcome),
        prompts.unit_test(schema, "Who?", ["SELECT 1", "SELECT 2"], 0),
        prompts.evaluate("SQLite", "Who?", "SELECT 1", outcome, "The result is 1."),
    ]  # fmt: skip
    for prompt, stage in zip(asked, model.STAGES, strict=True):
        messages = [{"role": "system", "content": prompt.system},
                    {"role": "user", "content": prompt.user}]  # fmt: skip
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text.startswith(f"<s>{stage}"), text[:80]
        assert text.endswith(f"Who?{model.ANSWER}") or "Who?\n" in text
        assert prompt.system not in text
        head = tokenizer(text, add_special_tokens=False)["input_ids"][:2]
        assert tokenizer.convert_ids_to_tokens(head) == ["<s>", stage]
    other = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(other, tokenize=False, add_generation_prompt=True)
    assert text == f"<s>Be brief.\nHello{model.ANSWER}", "what it does not know it passes on"


def test_the_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in Path(MODEL).iterdir()) < 10_000_000
