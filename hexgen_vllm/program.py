"""A command as a program: how it ends, for whoever gave it."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Final

from hexgen_vllm.errors import HexgenError

_PIPE_CLOSED: Final = 128 + 13  # as a shell says it of SIGPIPE
_INTERRUPTED: Final = 128 + 2
_WRONG: Final = 2
_FULL: Final = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO))


def exit_code(prog: str, work: Callable[[], int]) -> int:
    """Do the work of a command and return its exit code.

    What is wrong with options, files or the place for our output gets one sentence and the code 2.
    Who interrupts a command or reads no more of its output knows why it ends.

    Args:
        prog: what the sentence calls the command.
        work: of it; returns the exit code if nothing is wrong.
    """
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper) and out.errors == "strict":
        out.reconfigure(errors="backslashreplace")  # not every terminal has all letters
    try:
        try:
            return work()
        finally:  # argparse, too, leaves what it printed in the buffer
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        _print_nowhere()
        return _PIPE_CLOSED
    except KeyboardInterrupt:
        return _INTERRUPTED
    except HexgenError as error:
        sentence = str(error)
    except OSError as error:
        if error.filename is not None:
            sentence = f"{error.filename} cannot be used: {error.strerror}."
        elif error.errno in _FULL:
            sentence = f"nothing more can be written: {error.strerror}."
            _print_nowhere()
        else:
            raise
    print(f"{prog}: {sentence}", file=sys.stderr)
    return _WRONG


def _print_nowhere() -> None:
    """Let nothing more go where output cannot go: the interpreter would try again at its end."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
