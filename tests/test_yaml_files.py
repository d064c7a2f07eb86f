"""Files as typed values: what is taken for what, and where a mistake is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.option import check, option
from hexgen_vllm.yaml_files import Located, mistyped, read


@dataclass(frozen=True)
class Options:
    """One option of each type."""

    count: int = option(1, "a count", least=1, most=2000)
    share: float = option(0.5, "a share", least=0.0, most=1.0)
    limit_s: float | None = option(None, "a limit")
    switch: bool = option(False, "a switch")
    word: str = option("a", "a word")
    truth: str = option("none", "a choice", choices=("none", "true"))
    names: tuple[str, ...] = option((), "names")
    loads: tuple[float, ...] = option((), "numbers")
    weights: Mapping[str, float] = option({}, "numbers by name")
    new_name: str = option("", "renamed", was="old_name")

    def __post_init__(self) -> None:
        check(self)
        if self.switch and self.share > 0.9:
            raise ConfigError("switch and share do not go together.")


def source_of(tmp_path: Path, text: str) -> Located:
    path = tmp_path / "some.yaml"
    path.write_text(text)
    return read(path)


def options(tmp_path: Path, text: str) -> Options:
    return source_of(tmp_path, text).options(Options, ())


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("count: 7", "count", 7),
        ("count: 2e3", "count", 2000),
        ("count: 7.0", "count", 7),
        ("share: 1", "share", 1.0),
        ("share: 1e-05", "share", 1e-5),
        ("limit_s: 3E+2", "limit_s", 300.0),
        ("limit-s: null", "limit_s", None),
        ("switch: yes", "switch", True),
        ("word: '7'", "word", "7"),
        ("word: 1e5", "word", "1e5"),
        ("truth: true", "truth", "true"),
        ("names: [a, b]", "names", ("a", "b")),
        ("loads: [1, 1e-1]", "loads", (1.0, 0.1)),
        ("weights: {a: 1, b: 2e-1}", "weights", {"a": 1.0, "b": 0.2}),
        ("new-name: x", "new_name", "x"),
        ("old-name: x", "new_name", "x"),
    ],
)
def test_a_value_is_of_its_options_type(tmp_path: Path, text: str, name: str, value: Any) -> None:
    found = getattr(options(tmp_path, text), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("word: a\ncount: x", ("line 2:", "count must be a number", "'x'")),
        ("word: a\ncount: 1.5", ("line 2:", "count must be a whole number", "1.5")),
        ("count: true", ("line 1:", "count must be a", "True")),
        ("count: null", ("line 1:", "count must be a", "None")),
        ("\nshare: nan", ("line 2:", "share must be a number", "'nan'")),
        ("\nshare: .nan", ("line 2:", "share must be finite")),
        ("share: [1]", ("line 1:", "share must be a number")),
        ("switch: 1", ("line 1:", "switch must be true or false")),
        ("\nword: 2026-01-01", ("line 2:", "word must be text", "2026")),
        ("word: 7", ("word must be text",)),
        ("word: no", ("word must be text",)),
        ("names: a", ("names must be a list of texts",)),
        ("names:\n- a\n- 7", ("line 3:", "names must be a list of texts")),
        ("loads:\n  - 1\n  - x\n", ("line 3:", "loads must be a list of numbers")),
        ("loads: {a: 1}", ("loads must be a list of numbers",)),
        ("weights: [a]", ("weights must be a mapping of names to numbers",)),
        ("weights: {a: x}", ("weights must be a mapping of names to numbers",)),
        ("word: a\n\ncuont: 1", ("line 3:", "'cuont'", "did you mean 'count'?")),
        ("limit: 1", ("'limit'", "did you mean 'limit_s'?")),
        ("7: 1", ("unknown key '7'",)),
        ("word: a\nshare: 2", ("line 2:", "share must be at most 1")),
        ("word: a\ntruth: maybe", ("line 2:", "truth must be one of")),
        ("share: 1\nword: a\nswitch: true", ("line 3:", "switch and share do not go together")),
        ("limit-s: 1\nlimit_s: 2", ("line 2:", "limit-s and limit_s")),
        ("old-name: a\nnew-name: b", ("line 2:", "old-name and new-name")),
        ("- a", ("line 1:", "must be a mapping")),
        ("count: 1\ncount: 2", ("line 2:", "count is there twice")),
    ],
)
def test_a_mistake_is_one_sentence_with_its_line(
    tmp_path: Path, text: str, words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        options(tmp_path, text)
    sentence = str(caught.value)
    assert sentence.startswith(f"{tmp_path / 'some.yaml'} line ")
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert all(word in sentence for word in words), sentence


def test_a_place_below_the_top_is_named(tmp_path: Path) -> None:
    source = source_of(tmp_path, "a:\n- {}\n- b:\n    count: x\n")
    with pytest.raises(ConfigError, match=r"line 4: a\[1\]\.b: count must be"):
        source.options(Options, ("a", 1, "b"))


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (str | None, "x must be text, not {}."),
        (str | int, "x must be text or a whole number, not {}."),
        (list[int], "x must be a list of whole numbers."),
        (Mapping[str, float], "x must be a mapping of names to numbers."),
        (list[Mapping[str, float]], "x must be a list of values."),
    ],
)
def test_a_sentence_says_what_type_a_value_must_be(hint: Any, words: str) -> None:
    assert str(mistyped("x", {}, hint)) == words


def test_dates_stay_dates_when_a_library_makes_them_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As lm-format-enforcer does, for the whole process and in place."""
    for reader in (yaml.SafeLoader, yaml.constructor.SafeConstructor):
        for kind in ("timestamp", "int", "bool", "null"):
            known = reader.yaml_constructors
            monkeypatch.setitem(known, f"tag:yaml.org,2002:{kind}", known["tag:yaml.org,2002:str"])
    read_ = source_of(tmp_path, "a: 2026-01-01\nb: 7\nc: true\nd: null\n").value
    assert read_ == {"a": date(2026, 1, 1), "b": 7, "c": True, "d": None}
