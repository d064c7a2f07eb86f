"""The signals that ask a program to end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

ENDING: Final = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def handled(
    on_signal: Callable[[], None], numbers: Sequence[signal.Signals] = ENDING
) -> Iterator[None]:
    """Call ``on_signal`` on the running loop for each signal, and ignore those that come later.

    A program that was asked to end has what it has done as its exit code; another signal while
    the interpreter shuts down must not turn that into the code of a killed process. Where no
    signal came, the caller's handlers are back afterwards.
    """
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in numbers}
    came = False

    def noted() -> None:
        nonlocal came
        came = True
        on_signal()

    for number in numbers:
        loop.add_signal_handler(number, noted)
    try:
        yield
    finally:
        # Held back meanwhile: a loop that gives up a signal leaves it to its default for a moment.
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        for number in numbers:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN if came else before[number])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
