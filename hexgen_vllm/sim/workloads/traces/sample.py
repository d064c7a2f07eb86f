"""``hexgen-vllm trace sample``: writes some workflows of a trace, each as likely as any other.

It reads the trace twice, to count and to write, and holds nothing of it.
"""

from __future__ import annotations

import argparse

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.sim.workloads.traces.convert import add_target, write
from hexgen_vllm.sim.workloads.traces.info import add_source, source_of
from hexgen_vllm.sim.workloads.workload import generator


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hexgen-vllm trace sample``."""
    add_source(parser)
    add_target(parser)
    parser.add_argument("--count", type=int, default=1000, help="workflows (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="another one, another sample")


def main(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        ConfigError: the trace cannot be read, or nothing can be written.
    """
    if args.count < 1:
        raise ConfigError("--count must be 1 or more.")
    source = source_of(args)
    known = source.known_format()
    seen = sum(1 for _ in source.workflows())
    rng = generator(args.seed, "sample")
    chosen = set(rng.sample(range(seen), min(args.count, seen)))
    found = (one for index, one in enumerate(source.workflows()) if index in chosen)
    count = write(args.out, args.to, found, known)
    print(
        f"{count} of {seen} workflows of {args.trace} ({known}) written to {args.out} ({args.to})"
    )
    return 0
