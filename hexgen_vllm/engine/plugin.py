"""What the installed package adds to every vLLM: flags, one utility call, nothing else.

vLLM calls :func:`register` through the entry point group ``vllm.general_plugins``, in every one
of its processes. A vLLM that does not ask for urgency scheduling runs as if we were not there.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import Any

from hexgen_vllm.engine.options import is_ours
from hexgen_vllm.engine.server import arguments, stats_api
from hexgen_vllm.errors import UnsupportedVLLM

logger = logging.getLogger(__name__)

_MARK = "_hexgen_vllm"


def register() -> None:
    """Add urgency scheduling to this process's vLLM; calling it again changes nothing.

    It never raises: a vLLM we cannot drive gets one warning, and an error only when urgency
    scheduling is asked for.
    """
    try:
        _install(by_default=False)
    except Exception as error:  # vLLM must start, whatever became of its insides
        logger.warning("hexgen_vllm adds nothing to this vLLM: %s", error)


def register_as_default() -> None:
    """Like :func:`register`, and make urgency scheduling the default of the command line.

    Raises:
        UnsupportedVLLM: this vLLM cannot be driven.
    """
    refusal = _refusal()
    if refusal is not None:
        raise UnsupportedVLLM(refusal)
    _install(by_default=True)


def _install(*, by_default: bool) -> None:
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs, _MARK, False):
        return
    setattr(EngineArgs, _MARK, True)
    refusal = _refusal()
    if refusal is not None:
        logger.warning("%s", refusal)
    _extend_parser(EngineArgs, by_default, refusal)
    _resolve_before_config(EngineArgs, refusal)
    stats_api.offer_utility()


def _refusal() -> str | None:
    """Return why this vLLM cannot be driven, ``None`` when it can."""
    try:
        from hexgen_vllm.engine import compat  # an unsupported vLLM fails its import already

        compat.check_seams()
    except UnsupportedVLLM as error:
        return str(error)
    return None


def _extend_parser(engine_args: Any, by_default: bool, refusal: str | None) -> None:
    original = engine_args.add_cli_args

    @functools.wraps(original)
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        # A parser of a vLLM that we do not know may lack what we look for.
        with contextlib.suppress(*([] if refusal is None else [Exception])):
            arguments.extend(parser, by_default=by_default, refusal=refusal)
        return parser

    engine_args.add_cli_args = staticmethod(add_cli_args)


def _resolve_before_config(engine_args: Any, refusal: str | None) -> None:
    original = engine_args.create_engine_config

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments.resolve(self, refusal=refusal)
        stats_api.offer_utility()
        ours = getattr(self, "scheduler_cls", None)
        if refusal is not None or not is_ours(ours):
            return original(self, *args, **kwargs)
        # Not named, our class leaves vLLM free to choose its own, which tells whether it has one.
        self.scheduler_cls = None
        try:
            config = original(self, *args, **kwargs)
        finally:
            self.scheduler_cls = ours
        arguments.take_place(config, ours)
        return config

    engine_args.create_engine_config = create_engine_config
