"""Figures about the structure of the package: its size, its circles, the way of one call.

    python -m tools.structure [--list]

Size: modules and lines below ``hexgen_vllm/``. Circles: sets of modules, and of files and folders
beside each other, that reach each other by imports; late ones and those for types count.
The way of one call: folders and files of the package that take part in it, and calls from a
function in one file to a function in another; of a call with a JSON answer through a running
router, and of a workflow's call in the simulator (the mean of one workflow's calls).
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "hexgen_vllm"
Graph = Mapping[str, frozenset[str]]


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Return the modules of the package by their dotted names."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def graph(found: Mapping[str, Path]) -> Graph:
    """Return which module of the package imports which."""
    edges = {}
    for name, path in found.items():
        reached = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                reached |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    reached.add(full if full in found else node.module)
        edges[name] = frozenset(reached & found.keys() - {name})
    return edges


def siblings(edges: Graph) -> Iterator[Graph]:
    """Yield for every folder which of its files and folders imports which."""
    parents = {name.rpartition(".")[0] for name in edges} - {""}
    for parent in sorted(parents):
        depth = parent.count(".") + 2
        grouped: dict[str, set[str]] = {}
        for name, reached in edges.items():
            if name.startswith(f"{parent}."):
                child = ".".join(name.split(".")[:depth])
                inside = (other for other in reached if other.startswith(f"{parent}."))
                others = {".".join(other.split(".")[:depth]) for other in inside}
                grouped.setdefault(child, set()).update(others - {child})
        yield {name: frozenset(reached) for name, reached in grouped.items()}


def circles(edges: Graph) -> list[list[str]]:
    """Return the sets of nodes that reach each other, each sorted (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


@dataclass
class Way:
    """What a profiler saw of the package.

    Attributes:
        files: those that took part, relative to the package.
        moves: calls from a function in one file to a function in another.
    """

    files: set[str] = field(default_factory=set)
    moves: int = 0

    @property
    def rooms(self) -> int:
        """Folders that took part."""
        return len({Path(file).parent for file in self.files})

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        """Take one event of :func:`sys.setprofile`."""
        if event != "call" or (file := own_file(frame)) is None:
            return
        self.files.add(file)
        caller = frame.f_back
        while caller is not None and (origin := own_file(caller)) is None:
            caller = caller.f_back
        if caller is not None and origin != file:
            self.moves += 1

    def watch(self, run: Callable[[], object]) -> None:
        """Run and watch ``run``."""
        sys.setprofile(self)
        try:
            run()
        finally:
            sys.setprofile(None)


def own_file(frame: FrameType) -> str | None:
    """Return the file of a frame if it belongs to the package and is no test double."""
    name = frame.f_code.co_filename
    prefix = f"{ROOT / PACKAGE}/"
    if not name.startswith(prefix) or name.startswith(f"{prefix}testing/"):
        return None
    return name.removeprefix(prefix)


def way_through_router() -> Way:
    """Return the way of a call that a client awaits as JSON; the router has served some before."""
    from hexgen_vllm.testing.stand import open_stand

    way = Way()

    async def post(stand: Any) -> None:
        async with stand.post(max_tokens=4) as answer:
            await answer.read()

    async def serve() -> None:
        async with open_stand(health_check_interval_secs=60, stats_interval_secs=60) as stand:
            for _ in range(3):
                await post(stand)
            await asyncio.sleep(0.5)
            sys.setprofile(way)
            try:
                await post(stand)
            finally:
                sys.setprofile(None)

    asyncio.run(serve())
    return way


def way_through_simulator() -> tuple[Way, int]:
    """Return the way of one simulated workflow, and how many calls it makes."""
    from hexgen_vllm.sim.policies import named
    from hexgen_vllm.sim.results import simulate
    from hexgen_vllm.sim.scenario_file import load

    scenario = load(ROOT / "examples" / "scenarios" / "demo.yaml")
    workload = replace(scenario.workload, workflows=1, warmup=0)
    scenario = replace(scenario, workload=workload, policies=(named("slack"),), seeds=(11,))
    bounds = scenario.limits()
    (run,) = scenario.runs(bounds.rate_per_s)
    specs, way, played = scenario.specs(run), Way(), []
    way.watch(lambda: played.append(simulate(scenario, run, bounds, specs)))
    return way, len(played[0].calls)


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(prog="python -m tools.structure")
    parser.add_argument("--list", action="store_true", help="name the circles and the files")
    args = parser.parse_args()
    found = modules()
    edges = graph(found)
    lines = sum(path.read_text().count("\n") for path in found.values())
    called = way_through_router()
    simulated, calls = way_through_simulator()
    inner = circles(edges)
    outer = [circle for level in siblings(edges) for circle in circles(level)]
    print(f"modules                        {len(found):6}")
    print(f"lines                          {lines:6}")
    print(f"circles of modules             {len(inner):6}  ({sum(map(len, inner))} modules)")
    print(f"circles of folders             {len(outer):6}  ({sum(map(len, outer))} folders)")
    print(f"JSON call: folders             {called.rooms:6}")
    print(f"JSON call: files               {len(called.files):6}")
    print(f"JSON call: moves               {called.moves:6}")
    print(f"simulated workflow: folders    {simulated.rooms:6}")
    print(f"simulated workflow: files      {len(simulated.files):6}")
    print(f"simulated call: moves          {simulated.moves / calls:6.0f}")
    if args.list:
        for circle in (*outer, *inner):
            print("circle:", " ".join(circle))
        print("JSON call:", " ".join(sorted(called.files)))
        print("simulated:", " ".join(sorted(simulated.files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
