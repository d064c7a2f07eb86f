"""Run the examples of agent frameworks in an environment of their own.

    python -m tests.examples.other_clients

They ask for an older openai than vLLM does, so the environment of the tests cannot hold them.
They are installed once, into ``.cache/clients``.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import venv

from tests.examples.clients import ROOT, check, module

HOME = ROOT / ".cache" / "clients"
PACKAGES = (
    "langchain-openai==1.7.3",
    "llama-index-llms-openai-like==0.8.1",
    "openai-agents",
    "anthropic",
)
PROGRAMS = ("langchain_chat", "llama_index_chat", "openai_agents", "anthropic_sdk")


def prepare() -> str:
    """Return the interpreter of the environment, which is made when it is not there."""
    python, done = HOME / "bin" / "python", HOME / "installed"
    if done.exists() and done.read_text() == "\n".join(PACKAGES):
        return str(python)
    venv.create(HOME, clear=True, symlinks=True, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *PACKAGES], check=True)
    done.write_text("\n".join(PACKAGES))
    return str(python)


def main() -> int:
    """Check every program; returns 1 when one fails."""
    python = prepare()
    failed = 0
    for name in PROGRAMS:
        try:
            asyncio.run(check(module(name, python)))
            print(f"{name}: ok", flush=True)
        except AssertionError as error:
            failed += 1
            print(f"{name}: FAILED: {error}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
