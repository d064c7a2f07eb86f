"""Shell completion: bash is asked as a terminal asks it; the others are made from the same list."""

from __future__ import annotations

import shlex
import subprocess

import pytest

from hexgen_vllm import cli
from hexgen_vllm.completion import SHELLS, script


def completed(*words: str) -> list[str]:
    """Return what bash offers for the last of ``words``."""
    line = " ".join(map(shlex.quote, ("hexgen-vllm", *words)))
    asked = (
        f"{script('bash')}\nCOMP_WORDS=({line})\nCOMP_CWORD={len(words)}\n"
        '_hexgen_vllm\nprintf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    ran = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
    assert ran.stderr == ""
    return ran.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("rou",), ["router"]),
        (("check",), ["check-policy", "check"]),
        (("bench", "sch"), ["scheduler"]),
        (("bench", "scheduler", "--nonsense"), []),
        (("router", "--max-held-c"), ["--max-held-calls"]),
        (("router", "--worker-url"), ["--worker-urls"]),
        (("router", "--log-format", ""), ["text", "json"]),
        (("router", "--log-format", "j"), ["json"]),
        (("router", "--config", "router.y"), []),  # files, by bash's own default
        (("sim", "scenario.yaml", "--work"), ["--workflows"]),
        (("completion", "--h"), ["--help"]),
        (("nonsense", "--"), []),
    ],
)
def test_bash_offers(words: tuple[str, ...], offered: list[str]) -> None:
    assert completed(*words) == offered


def test_every_command_and_option_is_in_every_script() -> None:
    scripts = {shell: script(shell) for shell in SHELLS}
    for words in cli.COMMANDS:
        _, parser = cli.command(words)
        for text in scripts.values():
            assert words[-1] in text
        for flag in parser._option_string_actions:
            name = flag.lstrip("-")
            assert f"-l {name} " in scripts["fish"] or f"-s {name} " in scripts["fish"] or (
                flag in ("--hexgen-form",)), flag  # fmt: skip
    for line in scripts["fish"].splitlines():
        assert shlex.split(line.replace("\\'", ""))[:3] == ["complete", "-c", "hexgen-vllm"]
    assert "bashcompinit" in scripts["zsh"]
