"""What the documentation points at exists: pages, headings, files, modules, names, options."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import pytest
import tomllib

from hexgen_vllm import cli
from tests.docs.pages import PAGES, ROOT, blocks, prose
from tools.reference import commands as reference

WITH_CHANGELOG: Final = (*PAGES, ROOT / "CHANGELOG.md")
LONG: Final = {"reference.md", "evaluation.md", "README.md"}  # written by programs, or all of it
MAX_LINES: Final = 200
SPAN: Final = re.compile(r"`([^`\n]+)`")
LINK: Final = re.compile(r"\]\(([^()\s]+)\)")
HEADING: Final = re.compile(r"^#+ (.+)$", re.MULTILINE)
MODULE: Final = re.compile(r"hexgen_vllm(?:\.\w+)+")
PATH: Final = re.compile(r"(?:[\w.-]+/)+[\w.-]*\w")
LISTED: Final = re.compile(r"^\| `(hexgen_\w+)` \| (?:counter|gauge|histogram) ", re.MULTILINE)
METRIC: Final = re.compile(r"`(hexgen_(?:router|vllm)_\w+?)(?:_bucket|_count|_sum)?[`{]")
FLAG: Final = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+(?![\w…-])")
FOLDERS: Final = tuple(
    path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")
)
# Options in the text that are not ours, by whose they are.
OF_VLLM: Final = {
    "--additional-config", "--block-size", "--config", "--data-parallel-size",
    "--disable-access-log-for-endpoints", "--disable-hybrid-kv-cache-manager",
    "--enable-sleep-mode",
    "--enable-prefix-caching",
    "--enforce-eager", "--gpu-memory-utilization", "--kv-offloading-size",
    "--no-async-scheduling",
    "--kv-transfer-config", "--max-num-batched-tokens", "--max-num-seqs", "--middleware",
    "--pipeline-parallel-size", "--port", "--scheduler-cls", "--scheduling-policy",
    "--tensor-parallel-size",
}  # fmt: skip
OF_OTHERS: Final = {
    "--agentinfer": "AgentInfer",
    "--extra-index-url": "pip",
    "--force-reinstall": "pip",
    "--no-deps": "pip",
    "--enable-program-scheduling": "vllm-router",
    "--node-ip-address": "ray",
    "--fake": "tools/gpu_check.sh",
    "--isolation": "buildah",
}
EXAMPLES: Final = ("examples.text2sql.options",)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of ``page``."""
    plain = (
        re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in HEADING.findall(prose(page))
    )
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", WITH_CHANGELOG, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(SPAN.sub("", prose(page))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_can_be_reached_from_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in
              LINK.findall(prose(index))}  # fmt: skip
    pages = {page for page in PAGES if page.parent == index.parent and page != index}
    assert pages <= linked


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.parent.name == "docs"], ids=lambda p: p.name
)
def test_pages_are_short_enough_to_find_things(page: Path) -> None:
    assert page.name in LONG or len(page.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_module_named_exists(page: Path) -> None:
    for span in SPAN.findall(prose(page)):
        for path in PATH.findall(span):
            if path.split("/")[0] in FOLDERS and not path.startswith("out/") and "*" not in span:
                assert any(list(ROOT.glob(p)) for p in (path, f"{path}*")), path
            elif path.endswith(".py") and not path.startswith("vllm/"):
                assert (ROOT / "hexgen_vllm" / path).exists(), path
        for name in MODULE.findall(span):
            assert is_there(name), name


def is_there(dotted: str) -> bool:
    """Tell whether a dotted name is a module, or a name in one."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:length])
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if source.exists():
            rest = parts[length:]
            return not rest or rest[0] in source.read_text()
    return False


def test_every_metric_named_exists() -> None:
    known = set(LISTED.findall((ROOT / "docs" / "metrics.md").read_text()))
    for page in PAGES:
        assert set(METRIC.findall(prose(page))) <= known, page.name


def test_every_extra_named_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for page in PAGES:
        for name in re.findall(r"(?:hexgen-vllm|\.)\[([\w,-]+)\]", page.read_text()):
            assert set(name.split(",")) <= set(extras), name


def our_flags() -> set[str]:
    """Return every option of every command and example of ours."""
    parsers = [reference.parser_of(path) for path in cli.COMMANDS]
    parsers += [reference.serve_parser(), reference.cluster_parser()]
    found = {flag for parser in parsers for a in parser._actions for flag in a.option_strings}
    for module in (*EXAMPLES, "hexgen_vllm.demo"):
        spec = find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        text = Path(spec.origin).read_text()
        found |= {f"--{name.replace('_', '-')}" for name in re.findall(r"^    (\w+): ", text, re.M)}
        found |= set(FLAG.findall(text))
    return found


def foreign_flags(page: Path) -> set[str]:
    """Return the options that ``page`` names as those of somebody else."""
    if page.name != "migration.md":
        return set()
    table = page.read_text().partition("vllm-router: begin")[2].partition("vllm-router: end")[0]
    return set(FLAG.findall(table))


def test_every_option_named_exists() -> None:
    known = our_flags() | OF_VLLM | set(OF_OTHERS)
    for page in PAGES:
        if page.name == "reference.md":
            continue
        named = {flag for span in SPAN.findall(prose(page)) for flag in FLAG.findall(span)}
        assert named - foreign_flags(page) <= known, page.name


def test_every_option_of_others_is_named() -> None:
    shown = "".join(page.read_text() for page in PAGES)
    assert all(flag in shown for flag in (*OF_VLLM, *OF_OTHERS))


@pytest.mark.engine
def test_vllm_has_the_options_that_are_called_its_own() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    assert {flag for action in parser._actions for flag in action.option_strings} >= OF_VLLM


def test_python_on_the_pages_can_be_parsed() -> None:
    for page in PAGES:
        for block in blocks(page):
            if block.language == "python":
                ast.parse(block.text, block.where)
