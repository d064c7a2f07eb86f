"""Every command with its options, taken from the parsers that read them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Final

from hexgen_vllm import cli
from hexgen_vllm.config import EngineOptions
from hexgen_vllm.option import add_arguments
from tools.reference.markdown import (
    code,
    shown,
    table,
)

_SAID_DEFAULT: Final = re.compile(r" \(default: ((?:[^()]|\([^()]*\))*)\)$")


def parser_of(path: tuple[str, ...]) -> argparse.ArgumentParser:
    """Return the parser of the command ``hexgen-vllm`` with ``path``."""
    module, about = cli.COMMANDS[path]
    parser = argparse.ArgumentParser(prog=" ".join(("hexgen-vllm", *path)), description=about)
    import_module(module).add_arguments(parser)
    return parser


def serve_parser() -> argparse.ArgumentParser:
    """Return a parser of our own options of ``vllm serve``; the others are vLLM's."""
    parser = argparse.ArgumentParser(prog="python -m hexgen_vllm.serve MODEL")
    add_arguments(parser, EngineOptions, prefix="hexgen-")
    return parser


def cluster_parser() -> argparse.ArgumentParser:
    """Return the parser of ``python -m hexgen_vllm.serve --cluster FILE``."""
    from hexgen_vllm.cluster import command_line

    return command_line.make_parser()


def sections() -> Iterator[tuple[str, str]]:
    """Yield title and text of each command."""
    about = "Every argument of `vllm serve`, and these; the same in `vllm serve` itself with"
    yield (
        "python -m hexgen_vllm.serve",
        f"{about} `--scheduling-policy urgency`.\n\n{options(serve_parser())}",
    )
    yield (
        "python -m hexgen_vllm.serve --cluster",
        f"Engines and router of a [file](#cluster-file).\n\n{options(cluster_parser())}",
    )
    for path, (_, text) in cli.COMMANDS.items():
        said = f"{text[0].upper()}{text[1:]}."
        yield " ".join(("hexgen-vllm", *path)), f"{said}\n\n{options(parser_of(path))}"


def options(parser: argparse.ArgumentParser) -> str:
    """Return the table of the options of ``parser``."""
    rows = [_row(action) for action in _actions(parser)]
    return table(("option", "value", "meaning"), rows) if rows else "It has no options."


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    hidden = (argparse.SUPPRESS,)
    return [
        action
        for action in parser._actions
        if action.help not in hidden and not isinstance(action, argparse._HelpAction)
    ]


def _row(action: argparse.Action) -> tuple[str, str, str]:
    names = ", ".join(code(name) for name in action.option_strings) or code(
        action.metavar or action.dest
    )
    return names, _value(action), _about(action)


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.choices is not None:
        return ", ".join(code(word) for word in action.choices)
    kind = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    return code(f"{kind} …" if action.nargs in ("+", "*") else kind)


def _about(action: argparse.Action) -> str:
    text = (action.help or "").replace("%%", "%").replace("%(default)s", str(action.default))
    text = _SAID_DEFAULT.sub(_spelled_default, text)
    value = "" if action.default in (False, argparse.SUPPRESS) else shown(action.default)
    return text if "default" in text or not value else f"{text} (default: {value})"


def _spelled_default(match: re.Match[str]) -> str:
    """Return ``(default: x)`` as a reader writes it, nothing where nothing is the default."""
    value = match[1]
    if value in ("None", "", "()", "{}"):
        return ""
    return f" (default: {code(value.lower() if value in ('True', 'False') else value)})"
