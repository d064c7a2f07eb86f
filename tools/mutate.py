"""Mutation tests of the policies: change the code in small ways and see whether a test notices.

    python -m tools.mutate [MODULE ...]

Each function of ``hexgen_vllm/policy/`` is changed in every way that mutmut knows (a term dropped,
a sign turned, a bound moved by one), and for each change the fast tests in ``tests/policy`` that
reach the function run. Printed per module: changes, killed (a test fails), survived, and those of
them that ``tests/policy/survivors.toml`` accepts, each with its reason. A ``zip`` that is not
``strict`` any more is accepted everywhere: it says that two lists are equally long, and they are.
So are other words in the text of an error: tests do not hold wording fast. Exit 1 when less than
90 % of the others are killed, or when an accepted survivor does not exist any more.

All of it happens in a copy below ``.cache/mutate``: the tree is not touched. Settings stand in
``[tool.mutmut]`` of ``pyproject.toml``; constants of modules are not mutated, nor are functions
with decorators.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import tomllib

ROOT: Final = Path(__file__).resolve().parents[1]
WORK: Final = ROOT / ".cache" / "mutate"
POLICY: Final = Path("hexgen_vllm/policy")
COPIED: Final = ("hexgen_vllm", "tests", "examples", "benchmarks", "pyproject.toml")
SURVIVORS: Final = ROOT / "tests" / "policy" / "survivors.toml"
LEAST: Final = 0.9
_ALL: Final = 'only_mutate = ["hexgen_vllm/policy/*.py"]'
_TEXT: Final = re.compile(r'f?"(?:[^"\\]|\\.)*"')
_SURVIVED: Final = (0, 5, 33)  # tests passed, none collected, none reaches the function


@dataclass(frozen=True)
class Change:
    """A mutation: where it is, and the code before and after.

    Attributes:
        module: name of the policy's module.
        function: with its class, as ``Class.function``.
        before: lines that are gone, without indentation.
        after: lines in their place.
    """

    module: str
    function: str
    before: str
    after: str


def accepted(text: str) -> dict[Change, str]:
    """Return the accepted survivors and their reasons from the text of ``survivors.toml``.

    Raises:
        ValueError: an entry lacks a key or a reason, or stands there twice.
    """
    found: dict[Change, str] = {}
    for entry in tomllib.loads(text).get("survivor", []):
        missing = {"module", "function", "before", "after", "reason"} - entry.keys()
        if missing or not entry["reason"].strip():
            raise ValueError(
                f"a survivor needs {', '.join(sorted(missing)) or 'a reason'}: {entry}"
            )
        change = Change(entry["module"], entry["function"], entry["before"], entry["after"])
        if change in found:
            raise ValueError(f"listed twice: {change}")
        found[change] = entry["reason"]
    return found


def is_harmless(change: Change) -> bool:
    """Whether no test should tell the two apart, whatever the code is."""
    return is_laxer_zip(change) or is_other_wording(change)


def is_other_wording(change: Change) -> bool:
    """Whether nothing is changed but the words of an error that is raised."""
    before, after = (_TEXT.sub('""', code) for code in (change.before, change.after))
    return change.before.startswith("raise ") and before == after


def is_laxer_zip(change: Change) -> bool:
    """Whether nothing is changed but that a ``zip`` is not strict any more."""
    laxer = re.sub(r",( strict=(False|None)| (?=\)))", "", change.after)
    return change.before != change.after and change.before.replace(", strict=True", "") == laxer


def change_of(mutant: str, diff: str) -> Change:
    """Return the change that mutmut calls ``mutant`` and shows as ``diff``."""
    module, _, function = mutant.removeprefix("hexgen_vllm.policy.").partition(".")
    function = function.rpartition("__mutmut_")[0]
    if function.startswith("xǁ"):
        function = ".".join(function[2:].split("ǁ"))
    lines = [line for line in diff.splitlines() if not line.startswith(("---", "+++"))]
    before = " ".join(line[1:].strip() for line in lines if line.startswith("-"))
    after = " ".join(line[1:].strip() for line in lines if line.startswith("+"))
    return Change(module, function.removeprefix("x_"), before, after)


def prepare(modules: Sequence[str]) -> None:
    """Make a fresh copy in which mutmut changes ``modules`` only.

    Raises:
        SystemExit: a module does not exist.
    """
    unknown = [name for name in modules if not (ROOT / POLICY / f"{name}.py").is_file()]
    if unknown:
        raise SystemExit(f"There is no module {unknown[0]!r} in {POLICY}.")
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    skipped = shutil.ignore_patterns("__pycache__", "_lib", "*.so")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, WORK / name, ignore=skipped)
        else:
            shutil.copy(ROOT / name, WORK / name)
    if modules:
        settings = WORK / "pyproject.toml"
        text = settings.read_text(encoding="utf-8")
        assert _ALL in text
        only = json.dumps([f"{POLICY}/{name}.py" for name in modules])
        settings.write_text(text.replace(_ALL, f"only_mutate = {only}"), encoding="utf-8")


def mutmut(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run mutmut in the copy."""
    command = [str(Path(sys.executable).with_name("mutmut")), *arguments]
    return subprocess.run(command, cwd=WORK, text=True, check=False, **options)


def outcomes() -> dict[str, int | None]:
    """Return the exit status of the tests by mutant; ``None`` for one that was not tried."""
    found: dict[str, int | None] = {}
    for path in sorted((WORK / "mutants" / POLICY).glob("*.py.meta")):
        found |= json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"]
    return found


def report(
    results: dict[str, int | None], survivors: dict[str, Change], known: dict[Change, str]
) -> tuple[str, bool]:
    """Return the table, with what is to be done, and whether it is good.

    Args:
        results: exit status of the tests by mutant.
        survivors: the changes that no test noticed, by mutant.
        known: accepted ones, of the modules that were tried.
    """
    module = {name: name.split(".")[2] for name in results}
    total = Counter(module.values())
    alive = Counter(change.module for change in survivors.values())
    fine = Counter(c.module for c in survivors.values() if c in known or is_harmless(c))
    lines = [f"{'module':<16}{'mutants':>9}{'killed':>9}{'survived':>10}{'accepted':>10}{'':>9}"]
    for name in [*sorted(total), "all"]:
        every, lived, ok = (
            sum(c.values()) if name == "all" else c[name] for c in (total, alive, fine)
        )
        share = (every - lived) / (every - ok) if every > ok else 1.0
        lines.append(f"{name:<16}{every:>9}{every - lived:>9}{lived:>10}{ok:>10}{share:>9.1%}")
    for name, change in sorted(survivors.items()):
        if change in known or is_harmless(change):
            continue
        lines.append(f"\nsurvived: {name}\n  - {change.before}\n  + {change.after}")
    stale = set(known) - set(survivors.values())
    lines += [f"\naccepted, and yet no survivor: {change}" for change in stale]
    return "\n".join(lines), share >= LEAST and not stale


def main(arguments: Iterable[str] | None = None) -> int:
    """Try the changes and print what became of them."""
    parser = argparse.ArgumentParser(prog="python -m tools.mutate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("module", nargs="*", help="modules of policy/, all if none is named")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    chosen = parser.parse_args(None if arguments is None else list(arguments))
    known = accepted(SURVIVORS.read_text(encoding="utf-8"))
    prepare(chosen.module)
    status = mutmut("run", "--max-children", str(chosen.processes)).returncode
    results = outcomes()
    if status or not results or None in results.values():
        print("mutmut did not get to its end; see above.", file=sys.stderr)
        return 2
    survivors = {
        name: change_of(name, mutmut("show", name, capture_output=True).stdout)
        for name, code in results.items()
        if code in _SURVIVED
    }
    tried = {name.split(".")[2] for name in results}
    text, good = report(results, survivors, {c: r for c, r in known.items() if c.module in tried})
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
