"""``hexgen-vllm trace info``: what a trace holds, read once and never held as a whole."""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from hexgen_vllm.report.summary import percentile
from hexgen_vllm.report.table import aligned
from hexgen_vllm.sim.workloads.traces.formats import AUTO, FORMATS, NAMES, TraceSource
from hexgen_vllm.sim.workloads.traces.model import SILENCE_S, TraceWorkflow

_KEPT: Final = 50_000  # values of a figure that its percentiles are taken from
_HASHES: Final = 5_000_000  # hashes that are remembered
_SHARES: Final = (0.1, 0.5, 0.9, 0.99)


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add what says which trace is read, and how."""
    add = parser.add_argument
    add("trace", type=Path, metavar="TRACE", help="a file, gzip or not, or a folder of them")
    add("--format", choices=NAMES, default=AUTO, help=f"format of the trace (default: {AUTO})")
    add(
        "--silence",
        type=float,
        default=SILENCE_S,
        metavar="S",
        help=f"a workflow is over when nothing came for so long (default: {SILENCE_S:g})",
    )
    add("--block-tokens", type=int, default=0, metavar="N", help="tokens of a hashed block")


def source_of(args: argparse.Namespace) -> TraceSource:
    """Return the trace that the command line names."""
    return TraceSource(args.trace, args.format, args.silence, args.block_tokens)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hexgen-vllm trace info``."""
    add_source(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        ConfigError: the trace cannot be read.
    """
    source = source_of(args)
    found = {"trace": str(args.trace), "format": source.known_format()}
    found |= figures(source.workflows())
    print(json.dumps(found, indent=1) if args.json else _text(found))
    return 0


class _Values:
    """A figure of which there are many values: some of them, and the sum of all."""

    def __init__(self) -> None:
        self._kept: list[float] = []
        self._rng = random.Random(0)
        self.count = 0
        self.total = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self.total += value
        if len(self._kept) < _KEPT:
            self._kept.append(value)
        elif (place := self._rng.randrange(self.count)) < _KEPT:
            self._kept[place] = value

    def told(self) -> dict[str, float]:
        """Return mean and percentiles."""
        if not self.count:
            return {}
        told = {"mean": round(self.total / self.count, 3)}
        return told | {f"p{share:.0%}"[:-1]: percentile(self._kept, share) for share in _SHARES}


def figures(workflows: Iterable[TraceWorkflow]) -> dict[str, Any]:
    """Return what ``workflows`` amount to, as a JSON object.

    ``hashed_share`` is the share of prompt tokens whose blocks came before, in any prompt.
    """
    values = {name: _Values() for name in ("calls", "prompt", "output", "think_s")}
    types: Counter[str] = Counter()
    seen: set[object] = set()
    known = hashed = prompts = graphs = deadlines = count = 0
    first_s = last_s = None
    for workflow in workflows:
        count += 1
        types[workflow.type] += 1
        deadlines += workflow.deadline_s is not None
        graphs += any(call.after not in ((), (i - 1,)) for i, call in enumerate(workflow.calls))
        values["calls"].add(len(workflow.calls))
        if workflow.arrived_s is not None:
            first_s = min(workflow.arrived_s, workflow.arrived_s if first_s is None else first_s)
            last_s = max(workflow.arrived_s, workflow.arrived_s if last_s is None else last_s)
        within: set[object] = set() if workflow.local else seen
        for call in workflow.calls:
            values["prompt"].add(call.prompt)
            values["output"].add(call.output)
            values["think_s"].add(call.think_s)
            prompts += call.prompt
            old = sum(block in within for block in call.blocks)
            hashed += len(call.blocks) > 0
            known += min(old * workflow.block_tokens, call.prompt)
            if len(within) < _HASHES:
                within.update(call.blocks)
    span_s = None if first_s is None or last_s is None or last_s <= first_s else last_s - first_s
    return {
        "workflows": count,
        "calls": values["prompt"].count,
        "parallel_workflows": graphs,
        "types": dict(types.most_common(10)),
        "span_s": span_s,
        "workflows_per_s": None if span_s is None else round(count / span_s, 6),
        "with_deadline": deadlines,
        "hashed_calls": hashed,
        "hashed_share": round(known / prompts, 4) if hashed else None,
        "calls_of_a_workflow": values["calls"].told(),
        "prompt_tokens": values["prompt"].told(),
        "output_tokens": values["output"].told(),
        "think_s": values["think_s"].told(),
    }


def _text(found: dict[str, Any]) -> str:
    """Return the figures for people."""
    lines = [f"{found['trace']}: {found['format']} ({FORMATS[found['format']].text})"]
    types = ", ".join(f"{name} {count}" for name, count in found["types"].items())
    lines.append(f"{found['workflows']} workflows ({types}), {found['calls']} calls")
    if found["span_s"] is None:
        lines.append("no arrival times")
    else:
        lines.append(f"{found['span_s']:.0f} s, {found['workflows_per_s']:.3g} workflows/s")
    if found["parallel_workflows"]:
        lines.append(f"{found['parallel_workflows']} workflows have parallel calls")
    if found["hashed_share"] is not None:
        lines.append(
            f"{found['hashed_calls']} calls have hashes; {found['hashed_share']:.0%} of prompt "
            "tokens came before"
        )
    if found["with_deadline"]:
        lines.append(f"{found['with_deadline']} workflows have deadlines")
    names = {
        "calls_of_a_workflow": "calls of a workflow", "prompt_tokens": "prompt, tokens",
        "output_tokens": "output, tokens", "think_s": "think time before a call, s",
    }  # fmt: skip
    rows = [
        [
            text,
            *(f"{value:,.4g}" if value < 100 else f"{value:,.0f}" for value in found[key].values()),
        ]
        for key, text in names.items()
        if found[key]
    ]
    heads = ["", "mean", *(f"P{share:.0%}"[:-1] for share in _SHARES)]
    return "\n".join([*lines, "", aligned(heads, rows)])
