"""Options validate themselves, and one declaration serves command line and files."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import pytest

from hexgen_vllm.config import DispatchOptions, EngineOptions
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.option import add_arguments, from_mapping, given, is_http_url, option


def test_unknown_option_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'orderr'; known are .*order"):
        from_mapping(EngineOptions, {"orderr": "slack"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"order": "lifo"}, "order must be one of"),
        ({"default_deadline_s": 0}, "default_deadline_s must be at least"),
        ({"default_deadline_s": "soon"}, "default_deadline_s must be a number"),
        ({"default_deadline_s": float("nan")}, "must be finite"),
        ({"max_displacements": 1.5}, "must be a whole number"),
        ({"max_displacements": float("inf")}, "must be a whole number"),
        ({"max_displacements": True}, "must be a number"),
        ({"default_deadline_s": "1e999"}, "must be finite"),
        ({"displace": 1}, "must be true or false"),
    ],
)
def test_bad_values_get_one_sentence(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        from_mapping(EngineOptions, values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("word", ["a", "a=b", "{", '{"a": ' + "[" * 50_000])
def test_what_is_no_named_number_gets_one_sentence(word: str) -> None:
    with pytest.raises(ConfigError, match="tenant_weights must be like NAME=NUMBER, not"):
        from_mapping(DispatchOptions, {"tenant_weights": [word]})


def test_whole_numbers_become_floats_where_a_float_is_meant() -> None:
    options = from_mapping(EngineOptions, {"default_deadline_s": 5})
    assert isinstance(options.default_deadline_s, float)


def test_a_number_in_the_notation_that_yaml_takes_for_text_is_one() -> None:
    options = from_mapping(
        EngineOptions, {"default_deadline_s": "1e-02", "max_displacements": "2e0"}
    )
    assert (options.default_deadline_s, options.max_displacements) == (0.01, 2)


def test_command_line_comes_from_the_fields() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser, EngineOptions, prefix="hexgen-")
    args = parser.parse_args(["--hexgen-order", "edf", "--no-hexgen-displace"])
    assert given(args, EngineOptions, prefix="hexgen-") == {"order": "edf", "displace": False}
    help_text = parser.format_help()
    assert "--hexgen-default-deadline-s" in help_text


def test_help_says_defaults_as_one_would_type_them() -> None:
    @dataclass(frozen=True)
    class Options:
        words: tuple[str, ...] = option(("a", "b"), "some words")
        flag: bool = option(False, "a switch")
        name: str | None = option(None, "a name")
        none: tuple[str, ...] = option((), "no words")
        number: int = option(0, "a number")

    parser = argparse.ArgumentParser()
    add_arguments(parser, Options)
    helps = {action.dest: action.help for action in parser._actions}
    del helps["help"]
    assert helps == {
        "words": "some words (default: a b)",
        "flag": "a switch (default: false)",
        "name": "a name",
        "none": "no words",
        "number": "a number (default: 0)",
    }


def test_nothing_given_leaves_the_defaults() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser, DispatchOptions)
    assert given(parser.parse_args([]), DispatchOptions) == {}
    assert from_mapping(DispatchOptions, {}) == DispatchOptions()


@pytest.mark.parametrize(
    ("text", "usable"),
    [
        ("http://a:80/v1", True), ("https://[::1]:1", True), ("http://[::1", False),
        ("http://a:99999", False), ("http://a:x", False), ("http://a:0", False), ("http://", False),
        ("http:///v1", False), ("ftp://a", False), ("a:80", False),
    ],
)  # fmt: skip
def test_what_is_no_address_is_known_before_it_is_asked(text: str, usable: bool) -> None:
    assert is_http_url(text) is usable
