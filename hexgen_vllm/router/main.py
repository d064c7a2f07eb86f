"""``hexgen-vllm router`` and ``python -m hexgen_vllm.router``.

``--config FILE`` brings options from YAML, by the names of their flags.

    worker-urls: [fast=http://10.0.0.1:8000, http://10.0.0.2:8000]
    policy: slack
    api-key: [k1]
    tenant-weights: {batch: 0.5}

What the command line gives goes first.
"""

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
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

from hexgen_vllm import descriptors, option, policy_file, signals
from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.program import exit_code
from hexgen_vllm.router.http.errors import why
from hexgen_vllm.router.observe import logs
from hexgen_vllm.router.options import (
    GROUPS,
    KEY_VARIABLES,
    RouterOptions,
    composed,
    parted,
)
from hexgen_vllm.router.processes.router_process import RouterProcess
from hexgen_vllm.router.processes.supervisor import CANNOT_START, Processes
from hexgen_vllm.yaml_files import Located, read

if TYPE_CHECKING:
    from hexgen_vllm.router.app import Router


_LOG = logging.getLogger(__name__)
Values = dict[str, Any]


def read_options(path: Path) -> tuple[Values, Values]:
    """Return the options of the router and of placement that a file gives.

    Raises:
        ConfigError: it cannot be read, or an option in it is unknown or wrong; one sentence that
            says in which line.
    """
    return options_in(read(path))


def options_in(source: Located) -> tuple[Values, Values]:
    """Return the options of the router and of placement that a file gives, already read.

    Raises:
        ConfigError: as :func:`read_options`.
    """
    top = {} if source.value is None else source.mapping(())
    keys: dict[str, str] = {}  # what the file calls each option
    router: Mapping[str, str] = {}
    dispatch: Mapping[str, str] = {}
    for key in top:
        name = key.replace("-", "_")
        if name in keys:
            problem = f"{keys[name]} and {key} are names of one option; give it once."
            raise source.error((), problem, key=key)
        keys[name] = key
        try:
            router, dispatch = parted(keys)
        except ConfigError as error:
            raise source.error((), error, key=key) from None
    return _given(source, router, RouterOptions), _given(source, dispatch, DispatchOptions)


def _given(source: Located, keys: Mapping[str, str], cls: type[Any]) -> Values:
    """Return the values of ``keys``, by the names that ``cls`` has for them.

    Raises:
        ConfigError: one is wrong; the error names its line.
    """
    hints = get_type_hints(cls)
    several = {n: key for n, key in keys.items() if get_origin(hints[n]) is tuple}
    found = source.given(cls, (), {n: key for n, key in keys.items() if n not in several})
    for name, key in several.items():
        try:
            found[name] = _texts(name, source.at((key,)))
        except ConfigError as error:
            raise source.error((), error, key=key) from None
    source.built((), lambda: cls(**found), keys)
    return found


def _texts(name: str, value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in values):
        raise ConfigError(f"{name} must be text or a list of texts.")
    return tuple(values)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the router's options to ``parser``."""
    parser.usage = "%(prog)s --worker-urls URL ... [options]"
    own = {f.name for f in fields(RouterOptions)}
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            if name == "config":
                about = "YAML file of these options"
                group.add_argument("--config", type=Path, metavar="FILE", help=about)
            else:
                option.add_argument(group, RouterOptions if name in own else DispatchOptions, name)


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


def serve_one(options: RouterOptions, dispatch: DispatchOptions, process: RouterProcess) -> None:
    """Be one of several router processes until SIGTERM, or until their parent is gone."""
    import uvloop

    # A terminal sends it to every process; the parent passes it on, so it would count twice.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logs.set_up(options.log_level, options.log_format)
    loop = uvloop.new_event_loop()
    try:
        loop.run_until_complete(_serve(options, dispatch, process))
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
    values = router | dispatch
    for name, variable in KEY_VARIABLES.items():
        key = environment.get(variable)
        if key:
            values[name] = (key,) if name in ("api_key", "admin_api_key") else key
    values |= option.given(args, RouterOptions) | option.given(args, DispatchOptions)
    options, placing = composed(values)
    policy_file.load(placing.policy)
    return options, placing


async def _serve(
    options: RouterOptions, dispatch: DispatchOptions, process: RouterProcess | None = None
) -> None:
    """Run until a signal, drain, and stop; a second signal ends the draining."""
    from hexgen_vllm.router.app import Router

    stop, now = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (now if stop.is_set() else stop).set()

    parent = multiprocessing.parent_process()
    if process is not None and parent is not None:
        asyncio.get_running_loop().add_reader(parent.sentinel, stop.set)
    with signals.handled(on_signal, signals.ENDING if process is None else (signal.SIGTERM,)):
        await _run_until(stop, now, Router(options, dispatch, process=process))


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


def run(argv: Sequence[str] | None = None) -> int:
    """Run the router as a program of its own and return its exit code."""
    parser = option.Parser(
        prog="python -m hexgen_vllm.router",
        description="Place calls of LLM workflows on several engines.",
    )
    add_arguments(parser)
    return exit_code(parser.prog, lambda: main(parser.parse_args(argv)))
