"""``python -m hexgen_vllm.serve --cluster cluster.yaml [--log-dir DIR]``.

Exit code 0 after SIGINT or SIGTERM, 1 when a process died, 2 when the file is wrong. A second
signal does not wait for running calls.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from hexgen_vllm.cluster.file import load
from hexgen_vllm.cluster.process import ProcessFailed
from hexgen_vllm.cluster.spec import ClusterSpec
from hexgen_vllm.cluster.supervisor import Cluster
from hexgen_vllm.errors import ConfigError

PROG = "python -m hexgen_vllm.serve"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and leave."""
        self.exit(2, f"{self.prog}: {message.rstrip('.')}.\n")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = _Parser(prog=PROG, description="Start several engines and the router.")
    parser.add_argument("--cluster", required=True, type=Path, metavar="FILE", help="cluster file")
    parser.add_argument("--log-dir", metavar="DIR", help="directory of the logs")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the cluster named on the command line; return the exit code."""
    args = make_parser().parse_args(argv)
    try:
        spec = load(args.cluster)
    except ConfigError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    if args.log_dir is not None:
        spec = replace(spec, log_dir=args.log_dir)
    return asyncio.run(run(spec))


async def run(spec: ClusterSpec) -> int:
    """Run a cluster until a signal or the death of a process; return the exit code."""
    cluster = Cluster(spec, report=lambda line: print(line, file=sys.stderr, flush=True))
    stopped = _stop_signals(cluster)
    running = asyncio.ensure_future(_start_and_watch(cluster))
    try:
        await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            running.cancel()
            await asyncio.wait({running})
            return 0
        running.result()
        return 0
    except ProcessFailed as error:
        print(f"{PROG}: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        await cluster.stop()


def _stop_signals(cluster: Cluster) -> asyncio.Future[None]:
    """Return a future that the first SIGINT or SIGTERM completes; the second kills."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[None] = loop.create_future()

    def stop() -> None:
        if stopped.done():
            cluster.kill()
        else:
            stopped.set_result(None)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    return stopped


async def _start_and_watch(cluster: Cluster) -> None:
    await cluster.start()
    engines = ", ".join(
        f"{entry.name} {url}"
        for entry, url in zip(cluster.spec.engines, cluster.engine_urls, strict=True)
    )
    router = "no router" if cluster.spec.router is None else f"router {cluster.router_url}"
    print(f"ready: {router}; engines {engines}; logs {cluster.log_dir}", flush=True)
    if not cluster.processes:  # only servers of others: there is nobody to watch
        await asyncio.Event().wait()
    await cluster.watch()
