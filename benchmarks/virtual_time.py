"""An event loop in virtual time: a program of asyncio plays as fast as it can, and always alike.

Sockets of this process are real. Whenever none of them has anything, time goes on to the next
timer; how busy the machine is does not matter, and what threads would do is done at once.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, TypeVar

T = TypeVar("T")
_ARRIVES_S: Final = 0.002
"""Real seconds in which bytes from this machine to itself have come, or are none."""


class LoopClock:
    """The time of the running event loop."""

    def now(self) -> float:
        """Return seconds."""
        return asyncio.get_running_loop().time()


class _Selector(selectors.DefaultSelector):
    now_s = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:
            return super().select(0)
        found = super().select(_ARRIVES_S if timeout is not None else None)
        if not found and timeout is not None:
            self.now_s += timeout
        return found


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)
        self.set_default_executor(_AtOnce())

    def time(self) -> float:
        return self._virtual.now_s


class _AtOnce(ThreadPoolExecutor):
    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        done: Future[T] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except BaseException as error:
            done.set_exception(error)
        return done


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run ``main`` to its end in a loop of its own."""
    loop = _Loop()
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(main)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        asyncio.set_event_loop(None)
        loop.close()
