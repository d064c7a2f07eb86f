"""The command lines of engines and router."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hexgen_vllm.cluster.spec import EngineEntry, RouterEntry

ROUTER_MODULE = "hexgen_vllm.router"
SERVE_MODULE = "hexgen_vllm.serve"
STOCK_MODULE = "vllm.entrypoints.openai.api_server"


def flags(options: Mapping[str, Any]) -> list[str]:
    """Return ``options`` as command line arguments.

    ``true`` is a bare flag, ``false`` its ``--no-`` form, a list gives several values, a mapping
    is written as JSON.
    """
    return [word for name, value in options.items() for word in _flag(name, value)]


def _flag(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, Mapping):
        return [f"{flag}={json.dumps(dict(value))}"]
    if isinstance(value, list | tuple):
        return [flag, *map(str, value)]
    return [f"{flag}={value}"]


def engine_command(entry: EngineEntry, port: int) -> list[str]:
    """Return the command that starts ``entry`` on ``port``; it has no ``url``.

    The schedulers ``fcfs`` and ``priority`` are vLLM's own, and so is the program that runs them.
    """
    if entry.command:
        filled = {"{host}": entry.host, "{port}": str(port)}
        return [_filled(word, filled) for word in entry.command]
    listen = [f"--host={entry.host}", f"--port={port}"]
    if entry.scheduler == "hexgen":
        options = flags({f"hexgen-{name}": value for name, value in entry.hexgen.items()})
        return [*_python(SERVE_MODULE), entry.model, *listen, *options, *entry.args]
    policy = f"--scheduling-policy={entry.scheduler}"
    return [*_python(STOCK_MODULE), f"--model={entry.model}", *listen, policy, *entry.args]


def router_command(
    entry: RouterEntry, port: int, engines: Sequence[tuple[EngineEntry, str]], drain_s: float
) -> list[str]:
    """Return the command that starts the router of ``entry`` on ``port``.

    Args:
        entry: the router.
        port: where it listens.
        engines: its engines and their URLs.
        drain_s: seconds it has to finish calls in flight when it is stopped.
    """
    listen = [f"--host={entry.host}", f"--port={port}", f"--policy={entry.policy}"]
    known = {"shutdown_timeout": drain_s, **stock_scheduling(engine for engine, _ in engines)}
    given = {name.replace("-", "_"): value for name, value in entry.options.items()}
    workers = [f"{engine.name}={engine.worker_url(url)}" for engine, url in engines]
    return [
        *_python(ROUTER_MODULE),
        *listen,
        *flags({**known, **given}),
        *(("--worker-urls", *workers) if workers else ()),
    ]


def stock_scheduling(engines: Iterable[EngineEntry]) -> dict[str, str]:
    """Return the router's option that says how stock engines order calls, if all do alike.

    A stock vLLM does not tell, and a router that is not told must guess.
    """
    started = (engine for engine in engines if engine.url is None and not engine.command)
    schedulers = {engine.scheduler for engine in started} - {"hexgen"}
    return {"stock_scheduling": schedulers.pop()} if len(schedulers) == 1 else {}


def engine_env(entry: EngineEntry) -> dict[str, str]:
    """Return the environment variables that ``entry`` adds."""
    device = {} if entry.device is None else {"CUDA_VISIBLE_DEVICES": entry.device}
    return {**device, **entry.env}


def _python(module: str) -> list[str]:
    return [sys.executable, "-m", module]


def _filled(word: str, values: Mapping[str, str]) -> str:
    for mark, value in values.items():
        word = word.replace(mark, value)
    return word
