"""``python -m hexgen_vllm.serve --cluster cluster.yaml [--log-dir DIR] [--backend ray]``.

Exit code 0 after SIGINT or SIGTERM, 1 when a process died, 2 when the file or what it asks for is
wrong. A second signal does not wait for running calls.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from hexgen_vllm import signals
from hexgen_vllm.cluster.file import load
from hexgen_vllm.cluster.processes import ProcessFailed
from hexgen_vllm.cluster.spec import ClusterSpec
from hexgen_vllm.cluster.supervisor import Cluster, Running
from hexgen_vllm.option import Parser

PROG = "python -m hexgen_vllm.serve"
BACKENDS: Final = ("local", "ray")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = Parser(prog=PROG, description="Start several engines and the router.")
    parser.add_argument("--cluster", required=True, type=Path, metavar="FILE", help="cluster file")
    parser.add_argument("--log-dir", metavar="DIR", help="directory of the logs")
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default=BACKENDS[0],
        help="who starts the engines: this machine, or Ray on its nodes (default: local)",
    )
    parser.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="Ray cluster to join, or auto; without it one is started here",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the cluster named on the command line; return the exit code.

    Raises:
        ConfigError: the file or what it asks for is wrong.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.ray_address is not None and args.backend != "ray":
        parser.error("argument --ray-address: goes with --backend ray only")
    spec = load(args.cluster)
    if args.log_dir is not None:
        spec = replace(spec, log_dir=args.log_dir)
    if args.ray_address is not None:
        spec = replace(spec, ray={**spec.ray, "address": args.ray_address})
    return asyncio.run(run(_made(spec, args.backend)))


def _made(spec: ClusterSpec, backend: str) -> Running:
    """Return the cluster of ``spec``, not started yet."""
    if backend == "ray":
        from hexgen_vllm.cluster.ray.supervisor import RayCluster

        return RayCluster(spec, report=_report)
    return Cluster(spec, report=_report)


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def run(cluster: Running) -> int:
    """Run a cluster until a signal or the death of a process; return the exit code.

    Raises:
        ConfigError: what it is to be made of cannot be had.
    """
    stopped: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_signal() -> None:
        if stopped.done():
            cluster.kill()
        else:
            stopped.set_result(None)

    with signals.handled(on_signal):
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


async def _start_and_watch(cluster: Running) -> None:
    await cluster.start()
    print(f"ready: {cluster.summary()}", flush=True)
    await cluster.watch()
