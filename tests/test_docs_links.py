"""What the documentation points at exists, and every command that it shows is understood."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from hexgen_vllm.config import EngineOptions

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(page for folder in (".", "docs", "patches") for page in (ROOT / folder).glob("*.md"))
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:^ {4,}\S.*\n)+", re.MULTILINE)
SPAN = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
OURS = ("examples", "hexgen_vllm")


class Understood(BaseException):
    """Raised instead of running a command whose arguments were parsed."""


def prose(page: Path) -> str:
    """Return the text of ``page`` without blocks of code."""
    return FENCED.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of ``page``."""
    plain = (
        re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in HEADING.findall(prose(page))
    )
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in plain}


def blocks(page: Path) -> Iterator[str]:
    """Yield the shell code of ``page``: fenced, or indented by four spaces."""
    for _, language, code in FENCED.findall(page.read_text()):
        if language in ("", "sh", "bash"):
            yield code
    yield from INDENTED.findall(prose(page))


def commands(code: str) -> Iterator[list[str]]:
    """Yield the commands of ours in ``code``, in words; a quoted word may span lines."""
    pending = ""
    for line in code.replace("\\\n", " ").splitlines(keepends=True):
        pending += line
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:
            continue
        pending = ""
        while words and "=" in words[0]:
            words = words[1:]  # the environment
        words = words[: words.index("&")] if "&" in words else words
        if words[:1] == ["hexgen-vllm"]:
            yield ["python", "-m", "hexgen_vllm.cli", *words[1:]]
        elif words[:2] == ["vllm", "serve"]:
            yield words
        elif words[1:2] == ["-m"] and words[2].split(".")[0] in OURS:
            yield ["python", *words[1:]]


SHOWN = [words for page in PAGES for block in blocks(page) for words in commands(block)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(SPAN.sub("", prose(page))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_pages_and_their_commands_are_found() -> None:
    assert len(PAGES) >= 5
    assert {"hexgen_vllm.cli", "hexgen_vllm.serve", "examples.text2sql", "MODEL"} <= {
        words[2] for words in SHOWN
    }


def check_engine_flags(words: list[str]) -> None:
    """Check our flags of ``vllm serve``; the others are vLLM's."""
    known = {f"--hexgen-{field.name.replace('_', '-')}" for field in fields(EngineOptions)}
    assert {word for word in words if word.startswith("--hexgen-")} <= known


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("words", SHOWN, ids=" ".join)
def test_every_command_shown_is_understood(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if words[0] == "vllm" or (words[2] == "hexgen_vllm.serve" and "--cluster" not in words):
        check_engine_flags(words)
        return
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *given: Any, **kwargs: Any) -> None:
        parse(self, *given, **kwargs)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", words[2:])
    with pytest.raises(Understood):
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
