"""Every fenced block is run or listed, and what is listed is at least understood."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from hexgen_vllm import cli
from hexgen_vllm.cluster import load
from hexgen_vllm.config import EngineOptions
from tests.docs import table
from tests.docs.pages import PAGES, ROOT, SHELL, Block, blocks, commands, prose, words
from tests.docs.runner import kind_of, not_run

LANGUAGES = {*SHELL, "python", "yaml", "text", "json"}
BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS = [c for block in BLOCKS if block.language in SHELL for c in commands(block)]
LISTED = [(command, entry) for command in COMMANDS if (entry := not_run(command))]
SPAN = re.compile(r"`((?:hexgen-vllm(?![\w./-])|python -m (?:hexgen_vllm|examples))[^`\n]*)`")
TARGET = re.compile(r"^([\w-]+):", re.MULTILINE)


class Understood(BaseException):
    """Raised instead of running a command whose arguments were parsed."""


def test_the_pages_are_found() -> None:
    assert len(PAGES) >= 15
    assert len(COMMANDS) >= 60


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.where)
def test_every_block_says_what_it_is(block: Block) -> None:
    assert block.language in LANGUAGES, f"{block.where}: ```{block.language}"
    if block.language == "yaml":
        assert block.file, f"{block.where}: the first line must name the file"


@pytest.mark.parametrize(
    "block",
    [b for b in BLOCKS if "engines:" in b.text and b.file and "values" not in b.file],
    ids=lambda b: b.where,
)
def test_every_cluster_file_shown_is_one(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(block.text)
    assert load(path).engines


def test_no_code_is_only_indented() -> None:
    for page in PAGES:
        found = re.findall(r"(?<=\n\n) {4,}\S.*", prose(page))
        assert not [line for line in found if not re.match(r" +(?:[-*|]|\d+\.) ", line)], page.name


def test_every_entry_of_the_table_is_needed() -> None:
    shown = "\n".join(block.text for block in BLOCKS)
    for entry in table.NOT_RUN:
        assert any(entry is used for _, used in LISTED), entry
    parts = [*(entry.part for entry in table.APPENDED), *table.REPLACED]
    for part in (*parts, *table.GIVEN, *table.ROUTER_GIVEN, *table.MODELS):
        assert part in shown, part


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(("command", "entry"), LISTED, ids=[c for c, _ in LISTED])
def test_what_is_not_run_is_checked_otherwise(
    command: str, entry: table.NotRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert entry.reason
    if entry.instead == "make":
        target = "env" if command.startswith(". ") else words(command)[1]
        assert target in TARGET.findall((ROOT / "Makefile").read_text())
    elif entry.instead in ("parse", "engine"):
        understand(words(command), monkeypatch)
    else:
        assert (ROOT / entry.instead).exists()


@pytest.mark.engine
def test_vllm_understands_what_is_not_run_of_it() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    shown = [words(command) for command, entry in LISTED if entry.instead == "engine"]
    assert shown
    for said in shown:
        rest = said[said.index("hexgen_vllm.serve") + 1 :]
        args = make_arg_parser(FlexibleArgumentParser()).parse_args(rest)
        assert args.model_tag == rest[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_in_the_text_is_understood(page: Path) -> None:
    for span in SPAN.findall(prose(page)):
        said = shlex.split(span)
        if "…" not in span and not set(said) & {"FILE", "OUT"}:
            assert_known_options(said)


def understand(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the words of a command of ours with its own parser; run nothing."""
    if said[:1] == ["hexgen-vllm"]:
        path = next(p for p in (tuple(said[1:3]), tuple(said[1:2])) if p in cli.COMMANDS)
        parser = argparse.ArgumentParser()
        import_module(cli.COMMANDS[path][0]).add_arguments(parser)
        parser.parse_args(said[1 + len(path) :])
    elif kind_of(" ".join(map(shlex.quote, said))) == "engine":
        known = {f"--hexgen-{field.name.replace('_', '-')}" for field in fields(EngineOptions)}
        assert {word for word in said if word.startswith("--hexgen-")} <= known
    else:
        assert said[:2] == ["python", "-m"], said
        run_until_parsed(said[2:], monkeypatch)


def run_until_parsed(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a module until its arguments are parsed."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *given: Any, **kwargs: Any) -> None:
        parse(self, *given, **kwargs)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", said)
    with pytest.raises(Understood):
        runpy.run_module(said[0], run_name="__main__", alter_sys=True)


def assert_known_options(said: list[str]) -> None:
    """Check that a command in the text exists, with the options that it names."""
    if said[0] == "hexgen-vllm":
        path = next((p for p in (tuple(said[1:3]), tuple(said[1:2])) if p in cli.COMMANDS), None)
        if path is None:
            groups = {one[0] for one in cli.COMMANDS if len(one) > 1} | {"bench"}
            assert not said[1:] or said[1] in groups, said
            return
        parser = argparse.ArgumentParser()
        import_module(cli.COMMANDS[path][0]).add_arguments(parser)
        known = {flag for action in parser._actions for flag in action.option_strings}
        assert {word.partition("=")[0] for word in said if word.startswith("--")} <= known, said
        return
    module = said[2]
    assert (ROOT / module.replace(".", "/")).exists() or (
        ROOT / f"{module.replace('.', '/')}.py"
    ).exists(), said
