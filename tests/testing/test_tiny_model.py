"""The tiny model: the same files every time, text for every token, SQL in few tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.testing.tiny_model import (
    SPEC_FILE,
    TinySpec,
    build,
    main,
    train_tokenizer,
)

pytestmark = pytest.mark.engine
SMALL = TinySpec(hidden=64, layers=1)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_same_spec_gives_the_same_files(tmp_path: Path) -> None:
    first = contents(build(tmp_path / "a", SMALL))
    assert contents(build(tmp_path / "b", SMALL)) == first
    other = contents(build(tmp_path / "c", TinySpec(hidden=64, layers=1, seed=1)))
    assert other["model.safetensors"] != first["model.safetensors"]
    assert other["tokenizer.json"] == first["tokenizer.json"]


def test_a_finished_model_is_reused_and_an_unfinished_one_is_not(tmp_path: Path) -> None:
    weights = build(tmp_path, SMALL) / "model.safetensors"
    weights.write_bytes(b"kept")
    build(tmp_path, SMALL)
    assert weights.read_bytes() == b"kept"
    (tmp_path / SPEC_FILE).unlink()
    build(tmp_path, SMALL)
    assert weights.read_bytes() != b"kept"


def test_sql_and_english_take_few_tokens_and_come_back_unchanged() -> None:
    tokenizer = train_tokenizer(TinySpec.vocab, TinySpec.positions)
    text = "SELECT COUNT(*) FROM orders WHERE price > 10 GROUP BY city; -- how many orders?"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(text) / len(ids) > 3
    odd = "naïve\t日本 🦊"
    assert tokenizer.decode(tokenizer.encode(odd)) == odd


def test_chat_template_names_the_speakers() -> None:
    tokenizer = train_tokenizer(TinySpec.vocab, TinySpec.positions)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert prompt == "<s>system: Be brief.\nuser: Hi\nassistant: "


def test_more_tokens_than_the_corpus_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="vocab must be at most"):
        train_tokenizer(100_000, TinySpec.positions)


@pytest.mark.parametrize("bad", [["--hidden", "100"], ["--layers", "0"]])
def test_a_bad_shape_is_one_sentence_and_exit_code_2(
    bad: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "out"), *bad]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert bad[0].lstrip("-") in said
    assert not (tmp_path / "out").exists()
