"""``hexgen-vllm batch status [ID]``: the newest batches of a server, or all about one."""

from __future__ import annotations

import argparse
import json

from hexgen_vllm.batches import client
from hexgen_vllm.batches.client import BatchServer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hexgen-vllm batch status``."""
    parser.add_argument("batch", nargs="?", metavar="ID", help="the batch (default: all of them)")
    client.add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Print it.

    Raises:
        ConfigError: the server cannot be asked, or has no such batch.
    """
    server = BatchServer.of(args)
    if args.batch is not None:
        print(json.dumps(server.batch(args.batch), indent=2))
        return 0
    for one in server.batches():
        counts = one["request_counts"]
        done = f"{counts['completed'] + counts['failed']}/{counts['total']}"
        print(f"{one['id']}  {one['status']:<11}  {done:>11}  {one['endpoint']}")
    return 0
