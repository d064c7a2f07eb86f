"""A client whose calls carry headers computed at the moment of each call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, wraps
from inspect import Parameter, signature
from typing import Final

from hexgen_vllm import wire
from hexgen_vllm.client import retries
from hexgen_vllm.client import scope as scopes
from hexgen_vllm.client.scope import Scope

Headers = Callable[[], dict[str, str]]

_DEADLINE: Final = wire.header_name("workflow_deadline_ms")
_OF_DEADLINE: Final = frozenset({_DEADLINE, retries.MARK})  # the caller's own one is kept
_COPIES: Final = frozenset({"copy", "with_options"})  # return another client


class StageClient:
    """Stands for an OpenAI client or one of its resources.

    Entered as a context (``with`` or ``async with``), it is the enclosing stage of the stages
    opened inside, whose names become ``outer/inner``; leaving it does not close the client.
    """

    def __init__(self, target: object, headers: Headers, scope: Scope) -> None:
        self._target = target
        self._headers = headers
        self._scope = scope
        self._homes = _packages(target)

    def __getattr__(self, name: str) -> object:
        value = getattr(self._target, name)
        if callable(value):
            if name in _COPIES:
                return self._copying(value)
            return self._calling(value) if _takes_headers(value) else value
        return self._around(value) if _packages(value) & self._homes else value

    def __enter__(self) -> StageClient:
        scopes.enter(self._scope)
        return self

    def __exit__(self, *_: object) -> None:
        scopes.leave(self._scope)

    async def __aenter__(self) -> StageClient:
        return self.__enter__()

    async def __aexit__(self, *_: object) -> None:
        self.__exit__()

    def _around(self, value: object) -> StageClient:
        inner = StageClient(value, self._headers, self._scope)
        inner._homes = self._homes
        return inner

    def _copying(self, method: Callable[..., object]) -> Callable[..., StageClient]:
        @wraps(method)
        def copy(*args: object, **kwargs: object) -> StageClient:
            return self._around(method(*args, **kwargs))

        return copy

    def _calling(self, method: Callable[..., object]) -> Callable[..., object]:
        @wraps(method)
        def call(*args: object, **kwargs: object) -> object:
            given = kwargs.pop("extra_headers", None)
            extra = dict(given) if isinstance(given, Mapping) else {}
            ours = self._headers()
            if any(str(name).lower() == _DEADLINE for name in extra):
                ours = {name: value for name, value in ours.items() if name not in _OF_DEADLINE}
            return method(*args, extra_headers={**ours, **extra}, **kwargs)

        return call


def _takes_headers(method: Callable[..., object]) -> bool:
    return _accepts_headers(getattr(method, "__func__", method))


@lru_cache(maxsize=256)
def _accepts_headers(function: Callable[..., object]) -> bool:
    """Return whether ``function`` has the SDK's ``extra_headers``; signatures are slow to read."""
    parameters = signature(function).parameters
    return "extra_headers" in parameters or any(
        parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()
    )


def _packages(value: object) -> frozenset[str]:
    """Return the top-level packages that define the type of ``value``: tells a client's own
    resources from its settings, such as a URL or a number."""
    modules = (base.__module__ for base in type(value).__mro__)
    return frozenset(m.partition(".")[0] for m in modules) - {"abc", "builtins", "typing"}
