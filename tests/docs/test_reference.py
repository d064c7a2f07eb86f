"""The committed reference is that of the code, and names every environment variable."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hexgen_vllm import cli
from tests.docs.pages import ROOT
from tools.reference import python_api
from tools.reference.page import page
from tools.reference.variables import VARIABLES

PACKAGE = ROOT / "hexgen_vllm"
COMMITTED = ROOT / "docs" / "reference.md"
# One name behind what reads the environment, or written as a constant of its own.
READ = re.compile(r"""environ(?:\.get\(|\.setdefault\(|\[)\s*["']([A-Z][A-Z0-9_]+)["']""")
NAMED = re.compile(r"""["']((?:HEXGEN|OTEL_EXPORTER)_[A-Z0-9_]+)["']""")


def test_the_committed_page_is_not_stale() -> None:
    assert COMMITTED.read_text() == page(), (
        "write it anew: hexgen-vllm reference --out docs/reference.md"
    )


def test_every_command_is_there() -> None:
    text = page()
    for path in cli.COMMANDS:
        assert f"### `{' '.join(('hexgen-vllm', *path))}`" in text
    assert "`--hexgen-host-kv-gib`" in text
    assert "`--cluster`" in text


def sources() -> list[Path]:
    found = [*PACKAGE.rglob("*.py"), ROOT / "setup.py", *(ROOT / "tests/router/fuzz").glob("*.py")]
    return [path for path in found if path.name != "variables.py"]


def test_every_environment_variable_is_there() -> None:
    texts = [path.read_text() for path in sources()]
    read = {name for text in texts for name in (*READ.findall(text), *NAMED.findall(text))}
    set_by_us = {"OMP_NUM_THREADS"}
    assert read - set_by_us == set(VARIABLES)


@pytest.mark.parametrize("module", python_api.MODULES)
def test_every_public_name_says_what_it_is(module: str) -> None:
    names = python_api.public(module)
    assert names
    for name in names:
        _, node = python_api.definition(module, name)
        assert python_api.head(node), name


def test_what_may_be_left_out_shows_its_default() -> None:
    assert "`Workflow(client=None, *, deadline_s=None, type=" in page()
    assert "`with_deadline(params, deadline_s=None, *, " in page()


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reference"]) == 0
    assert capsys.readouterr().out == page()
    assert cli.main(["reference", "--out", str(tmp_path / "page.md")]) == 0
    assert (tmp_path / "page.md").read_text() == page()
    assert cli.main(["reference", "--out", str(tmp_path)]) == 2
    assert "cannot be written" in capsys.readouterr().err
