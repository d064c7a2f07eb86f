"""``hexgen-vllm batch cancel ID``: ends a batch; what has been answered stays."""

from __future__ import annotations

import argparse
from urllib.parse import quote

from hexgen_vllm.batches import client
from hexgen_vllm.batches.client import BatchServer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hexgen-vllm batch cancel``."""
    parser.add_argument("batch", metavar="ID", help="the batch")
    client.add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """End it.

    Raises:
        ConfigError: the server cannot be asked, has no such batch, or it has ended.
    """
    found = BatchServer.of(args).post(f"/batches/{quote(args.batch, safe='')}/cancel", {})
    print(f"{found['id']} {found['status']}")
    return 0
