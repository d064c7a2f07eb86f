"""The words of vLLM's command line that ask for urgency scheduling, and what they mean.

``--scheduling-policy urgency`` and ``--hexgen-…`` are shorthands. They are turned into vLLM's own
arguments (``scheduler_cls``, ``additional_config``, ``middleware``) as soon as the command line
is parsed, so that every process started afterwards sees only what plain vLLM knows.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from hexgen_vllm import wire
from hexgen_vllm.batches.store import check_folder
from hexgen_vllm.config import EngineOptions
from hexgen_vllm.engine.options import SCHEDULER, is_ours
from hexgen_vllm.errors import ConfigError, HexgenError, UnsupportedVLLM
from hexgen_vllm.option import add_arguments, from_mapping, given, known_names, with_current_names

logger = logging.getLogger("vllm.hexgen")
MIDDLEWARE: Final = "hexgen_vllm.engine.server.middleware.HexgenMiddleware"
URGENCY: Final = "urgency"
PREFIX: Final = "hexgen-"
GROUP: Final = "hexgen"
ABOUT: Final = (
    "Options of urgency scheduling (--scheduling-policy urgency): calls are ordered by the time"
    " that their workflow's deadline leaves them."
)


def extend(parser: Any, *, by_default: bool, refusal: str | None = None) -> None:
    """Teach a parser that has vLLM's engine arguments the words of urgency scheduling.

    Args:
        parser: the parser of one command, such as ``vllm serve``.
        by_default: a command line that chooses no scheduler gets urgency scheduling.
        refusal: why this vLLM cannot be driven; a command line that asks for us gets it as error.
    """
    _offer_policy(parser, by_default)
    _add_group(parser, by_default)
    parse = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, rest = parse(args, namespace)
        try:
            _refuse_unknown(rest)
            resolve(found, refusal=refusal)
        except HexgenError as error:
            parser.exit(2, f"{parser.prog}: {error}\n")
        return found, rest

    parser.parse_known_args = parse_known_args


def _offer_policy(parser: Any, by_default: bool) -> None:
    action = next(a for a in parser._actions if "--scheduling-policy" in a.option_strings)
    action.choices = [*action.choices, URGENCY]
    action.metavar = "{" + ",".join(action.choices) + "}"
    if by_default:
        # None, not "urgency": an explicit --scheduler-cls must be told from a contradiction.
        action.default = None
        action.help = f"{action.help}\n\nNot given, it is {URGENCY} unless --scheduler-cls is."


def _refuse_unknown(rest: list[str]) -> None:
    for word in rest:
        if word.startswith(f"--{PREFIX}"):
            flag = word.split("=", 1)[0]
            known = known_names(flag, [_flag(f.name) for f in fields(EngineOptions)])
            raise ConfigError(f"unknown option {flag}; known are {known}.")


def _add_group(parser: Any, by_default: bool) -> None:
    group = parser.add_argument_group(GROUP, ABOUT)
    add_arguments(group, EngineOptions, prefix=PREFIX)
    if by_default:  # for the help only: it is taken away before vLLM parses the rest
        about = "start the engines and the router of a cluster file; without other arguments"
        group.add_argument("--cluster", metavar="FILE", help=about)
    for action in group._group_actions:
        action.default = argparse.SUPPRESS  # else the help would say "default: None" of each


def resolve(target: Any, *, refusal: str | None = None) -> None:
    """Replace our shorthands in ``target`` by vLLM's own arguments; a second time changes nothing.

    Args:
        target: a parsed command line or ``EngineArgs``.
        refusal: see :func:`extend`.

    Raises:
        ConfigError: the arguments contradict each other, or a hexgen option is wrong.
        UnsupportedVLLM: urgency scheduling is asked for and ``refusal`` is set.
    """
    options = given(target, EngineOptions, prefix=PREFIX)
    if not _is_wanted(target):
        if getattr(target, "scheduling_policy", "") is None:
            target.scheduling_policy = "fcfs"
        if options:
            raise ConfigError(f"{_flag(next(iter(options)))} needs --scheduling-policy {URGENCY}.")
        return
    if refusal is not None:
        raise UnsupportedVLLM(refusal)
    target.scheduling_policy = "fcfs"  # vLLM validates the word; our scheduler replaces the queue
    target.scheduler_cls = target.scheduler_cls or SCHEDULER
    target.additional_config = _with_options(target.additional_config, options)
    _keep_kv(target, target.additional_config["hexgen"])
    _keep_batches(target.additional_config["hexgen"])
    middleware = getattr(target, "middleware", None)
    if middleware is None:  # no server
        return
    if rust_frontend():
        _give_telemetry(target.additional_config["hexgen"], getattr(target, "port", None))
    elif MIDDLEWARE not in middleware:
        target.middleware = [*middleware, MIDDLEWARE]


def _give_telemetry(options: dict[str, Any], port: object) -> None:
    """Have the engine process give its telemetry where our router looks for it, if it can."""
    if "stats_port" in options or not isinstance(port, int):
        return
    found, host = wire.stats_port(port), options.get("stats_host", EngineOptions.stats_host)
    if found is not None and _is_free(host, found):
        options["stats_port"] = found
    else:
        logger.warning(
            "Port %s cannot be had, so that nobody can read this engine's telemetry; choose "
            "another with --hexgen-stats-port and name it to the router.",
            found or f"{port} + 10000",
        )


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except OSError:
            return False
    return True


def rust_frontend() -> bool:
    """Return whether ``vllm serve`` answers HTTP by its Rust program, which has no middleware."""
    return os.environ.get("VLLM_USE_RUST_FRONTEND", "0").strip() not in ("", "0")


def _keep_batches(options: Mapping[str, Any]) -> None:
    """Check early what would else be noticed after the model was loaded.

    Raises:
        ConfigError: batches cannot be kept.
    """
    where = options.get("batch_dir")
    if not where:
        return
    if rust_frontend():
        raise ConfigError("batch_dir needs vLLM's server in Python, not the one in Rust.")
    check_folder(Path(where))


def _keep_kv(target: Any, options: Mapping[str, Any]) -> None:
    if options.get("host_kv_gib"):
        from hexgen_vllm.engine.swap.setup import choose_connector  # loads torch

        choose_connector(target, options)


def _flag(option: str) -> str:
    return f"--{PREFIX}{option.replace('_', '-')}"


def _is_wanted(target: Any) -> bool:
    policy = getattr(target, "scheduling_policy", "fcfs")  # a vLLM we do not know may lack them
    scheduler = getattr(target, "scheduler_cls", None)
    ours = is_ours(scheduler)
    if policy == URGENCY and not ours and scheduler is not None:
        raise ConfigError(
            f"--scheduling-policy {URGENCY} and --scheduler-cls {scheduler} exclude each other."
        )
    return ours or policy == URGENCY or (policy is None and scheduler is None)


def take_place(vllm_config: Any, scheduler_cls: Any) -> None:
    """Name our class in a configuration that vLLM made without it.

    Raises:
        ConfigError: vLLM has chosen a class of its own there: the model needs its rules.
    """
    from hexgen_vllm.engine import compat  # loads vLLM

    scheduler = vllm_config.scheduler_config
    if scheduler.scheduler_cls is not None:
        raise compat.not_ours(f"a model that vLLM schedules with {scheduler.scheduler_cls}")
    compat.stock_class(vllm_config)
    scheduler.scheduler_cls = scheduler_cls


def _with_options(additional_config: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(additional_config, Mapping):
        raise ConfigError("additional_config must be a mapping to carry the hexgen options.")
    given_there = additional_config.get("hexgen", {})
    if not isinstance(given_there, Mapping):
        raise ConfigError(f"additional_config.hexgen must be a mapping, not {given_there!r}.")
    merged = with_current_names(EngineOptions, {**given_there, **options})
    from_mapping(EngineOptions, merged, where="hexgen option")
    return {**additional_config, "hexgen": merged}
