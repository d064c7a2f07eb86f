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
    """Call ``on_signal`` on the running loop for each signal; ignore signals that come later.

    It is for programs that then end: what has been done is their exit code, and a signal while
    the interpreter shuts down must not turn it into that of a killed process.
    """
    loop = asyncio.get_running_loop()
    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        # Held back meanwhile: a loop that gives up a signal leaves it to its default for a moment.
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        for number in numbers:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
