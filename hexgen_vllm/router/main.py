"""``hexgen-vllm router`` and ``python -m hexgen_vllm.router``."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hexgen_vllm import config, descriptors, policy_file
from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.errors import ConfigError, HexgenError
from hexgen_vllm.router import logs
from hexgen_vllm.router.access_options import KEY_VARIABLES
from hexgen_vllm.router.broken import why
from hexgen_vllm.router.config_file import read_options
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.router.shard_main import CANNOT_START, Processes
from hexgen_vllm.router.spot import Spot

if TYPE_CHECKING:
    from hexgen_vllm.router.app import Router

_LOG = logging.getLogger(__name__)
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the router's options to ``parser``."""
    router = parser.add_argument_group("router")
    router.add_argument("--config", type=Path, metavar="FILE", help="YAML file of these options")
    config.add_arguments(router, RouterOptions)
    router.add_argument(
        "--cors-allowed-origins", dest="allowed_origins", nargs="+", help=argparse.SUPPRESS
    )
    config.add_arguments(parser.add_argument_group("placement"), DispatchOptions)


def main(args: argparse.Namespace) -> int:
    """Run a router until SIGTERM or SIGINT; return the exit code.

    Raises:
        ConfigError: an option is wrong, or the address cannot be had.
    """
    import uvloop

    options, dispatch = options_from(args, os.environ)
    later = options.discovers or options.admin_api_key or options.allow_unauthenticated_admin
    if not (options.worker_urls or later):
        raise ConfigError(
            "worker_urls must name at least one engine (--worker-urls URL ...), worker_dns or "
            "service_discovery must find them, or admin_api_key must let them be registered."
        )
    logs.set_up(options.log_level, options.log_format)
    descriptors.raise_limit()
    loop = uvloop.new_event_loop()
    try:
        if options.router_workers > 1:
            loop.run_until_complete(Processes(options, dispatch, serve_one).run())
        else:
            loop.run_until_complete(_serve(options, dispatch))
    finally:
        loop.close()
    return 0


def serve_one(options: RouterOptions, dispatch: DispatchOptions, spot: Spot) -> None:
    """Be one of several router processes until SIGTERM, or until their parent is gone."""
    import uvloop

    logs.set_up(options.log_level, options.log_format)
    loop = uvloop.new_event_loop()
    try:
        loop.run_until_complete(_serve(options, dispatch, spot))
    except ConfigError as error:
        print(f"hexgen-vllm router: {error}", file=sys.stderr)
        sys.exit(CANNOT_START)
    finally:
        loop.close()


def options_from(
    args: argparse.Namespace, environment: Mapping[str, str]
) -> tuple[RouterOptions, DispatchOptions]:
    """Return the options that command line, environment and file give, first one first.

    Raises:
        ConfigError: one of them is wrong.
    """
    router, dispatch = ({}, {}) if args.config is None else read_options(args.config)
    for name, variable in KEY_VARIABLES.items():
        key = environment.get(variable)
        if key:
            router[name] = key if name == "engine_api_key" else (key,)
    router |= config.given(args, RouterOptions)
    dispatch |= config.given(args, DispatchOptions)
    placing = config.from_mapping(DispatchOptions, dispatch)
    policy_file.load(placing.policy)
    return config.from_mapping(RouterOptions, router), placing


async def _serve(
    options: RouterOptions, dispatch: DispatchOptions, spot: Spot | None = None
) -> None:
    """Run until a signal, drain, and stop; a second signal ends the draining."""
    from hexgen_vllm.router.app import Router

    stop, now = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (now if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal)
    parent = multiprocessing.parent_process()
    if spot is not None and parent is not None:
        loop.add_reader(parent.sentinel, stop.set)
    try:
        await _run_until(stop, now, Router(options, dispatch, spot=spot))
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


async def _run_until(stop: asyncio.Event, now: asyncio.Event, router: Router) -> None:
    try:
        await router.start()
    except OSError as error:
        where = router.url.partition("://")[2]
        raise ConfigError(f"cannot listen on {where}: {why(error)}.") from error
    _spare_collector()
    await stop.wait()
    drained, hurried = asyncio.ensure_future(router.drain()), asyncio.ensure_future(now.wait())
    await asyncio.wait((drained, hurried), return_when=asyncio.FIRST_COMPLETED)
    if not drained.done():
        drained.cancel()
        await router.hang_up()
    hurried.cancel()
    await router.stop()
    _LOG.info("stopped")


def _spare_collector() -> None:
    """Take what is there after the start, and stays, out of what Python's collector looks through.

    A full collection would otherwise stop all streams for as long as all modules take.
    """
    gc.collect()
    gc.freeze()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"{self.prog}: {message.rstrip('.')}.\n")


def run(argv: Sequence[str] | None = None) -> int:
    """Run the router as a program of its own and return its exit code."""
    parser = _Parser(
        prog="python -m hexgen_vllm.router",
        description="Place calls of LLM workflows on several engines.",
    )
    add_arguments(parser)
    try:
        return main(parser.parse_args(argv))
    except HexgenError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
