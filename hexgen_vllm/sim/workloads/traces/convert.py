"""``hexgen-vllm trace convert``: writes a trace in another format."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.report.results import check_writable
from hexgen_vllm.sim.workloads.traces.formats import WRITERS, hashed
from hexgen_vllm.sim.workloads.traces.info import add_source, source_of
from hexgen_vllm.sim.workloads.traces.model import TraceWorkflow


def add_target(parser: argparse.ArgumentParser) -> None:
    """Add what says where workflows go, and how."""
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="file to write")
    add("--to", choices=tuple(WRITERS), default="hexgen", help="its format (default: hexgen)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hexgen-vllm trace convert``."""
    add_source(parser)
    add_target(parser)


def main(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        ConfigError: the trace cannot be read, or nothing can be written.
    """
    source = source_of(args)
    known = source.known_format()
    count = write(args.out, args.to, source.workflows(), known)
    print(f"{count} workflows of {args.trace} ({known}) written to {args.out} ({args.to})")
    return 0


def write(out: Path, to: str, workflows: Iterable[TraceWorkflow], known: str) -> int:
    """Write workflows that come from the format ``known``; return how many there were.

    What there is at ``out`` stays as it is unless all of them could be read.

    Raises:
        ConfigError: one cannot be read, or nothing can be written there.
    """
    check_writable(out)
    if to.startswith("agentic"):
        workflows = hashed(workflows, known)
    draft = out.with_name(f".{out.name}.part")
    count = 0
    try:
        with draft.open("w", encoding="utf-8") as file:
            writer = WRITERS[to](file.write)
            for workflow in workflows:
                writer.add(workflow)
                count += 1
        if not count:
            raise ConfigError("the trace holds no workflow.")
        draft.replace(out)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}.") from None
    finally:
        draft.unlink(missing_ok=True)
    return count
