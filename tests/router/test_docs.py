"""What docs/router.md says is so, its flags and endpoints, and every row of the fault table."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.router.main import add_arguments, read_options
from hexgen_vllm.router.options import GROUPS, RouterOptions
from hexgen_vllm.router.route import Access
from hexgen_vllm.router.routes import public
from tests.router.fault_table import BEGIN, CASES, END, HEADINGS, Case, row

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXT = (DOCS / "router.md").read_text()
FAULTS = (DOCS / "router-faults.md").read_text()
FLAG = re.compile(r"--[a-z][a-z0-9-]+")


def documented_rows() -> dict[str, tuple[str, ...]]:
    table = FAULTS.partition(BEGIN)[2].partition(END)[0]
    rows = [tuple(line[2:-2].split(" | ")) for line in table.splitlines() if line.startswith("| ")]
    assert rows[0] == HEADINGS
    return {cells[0]: cells for cells in rows[2:]}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_the_fault_table_is_what_is_seen(case: Case) -> None:
    assert documented_rows()[case.name] == await row(case)


def test_the_fault_table_has_no_other_rows() -> None:
    assert list(documented_rows()) == [case.name for case in CASES]


def test_every_flag_is_documented_and_every_documented_flag_exists() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    known = {word for action in shown for word in action.option_strings}
    assert set(FLAG.findall(TEXT)) <= known
    grouped = TEXT.partition("## Options by group")[2].partition("\n## ")[0]
    assert known - set(FLAG.findall(grouped)) <= {"-h", "--help"} | {
        k for k in known if k[:5] == "--no-"
    }


def test_the_groups_are_those_of_the_help_and_hold_each_option_once() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    shown = {
        group.title: [
            action.option_strings[0]
            for action in group._group_actions
            if action.help != argparse.SUPPRESS
        ]
        for group in parser._action_groups
        if group.title in GROUPS
    }
    rows = re.findall(r"^\| ([a-zA-Z ]+) \| `(--[^`]*)` \|$", TEXT, re.M)
    assert {title: flags.split() for title, flags in rows} == shown
    assert [title for title, _ in rows] == list(shown) == list(GROUPS)
    grouped = [name for names in GROUPS.values() for name in names]
    assert len(grouped) == len(set(grouped))
    options = {f.name for cls in (RouterOptions, DispatchOptions) for f in fields(cls)}
    aliases = {a for f in fields(RouterOptions) for a in f.metadata["aliases"]}
    assert set(grouped) == options - aliases | {"config"}


def test_every_route_is_documented_with_its_key() -> None:
    routes = list(public())
    rows = re.findall(r"^\| (`.*`.*) \| .* \| (none|client|admin) \|$", TEXT, re.M)
    written = {
        path: key
        for paths, key in rows
        for path in re.findall(r"`(?:(?:GET|POST|DELETE) )?(/[a-z_0-9/{}.]*)", paths)
    }
    keys = {Access.OPEN: "none", Access.CLIENT: "client", Access.ADMIN: "admin"}
    for route in routes:
        if route.path in ("/", "/ui/data"):  # said in the row of the page
            continue
        assert route.path in written, route.path
    for path, key in written.items():
        access = {keys[route.access] for route in routes if route.path == path}
        assert access, path
        assert key in access, path


def test_the_file_shown_is_one(tmp_path: Path) -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    path = tmp_path / "router.yaml"
    path.write_text(shown)
    router, dispatch = read_options(path)
    assert {**router, **dispatch}.keys() == {k.replace("-", "_") for k in yaml.safe_load(shown)}
