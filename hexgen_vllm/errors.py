"""Errors of the package.

HexgenError
├── ConfigError         a bad option, scenario or file; the message is one sentence
├── BadRequest          a client's request is wrong; carries what an OpenAI error object needs
├── Refused             the service cannot take the call now; carries a reason and a retry hint
└── UnsupportedVLLM     this vLLM cannot be driven; names the found and the supported versions
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Any, Final

_KINDS: Final = {401: "authentication_error", 429: "rate_limit_error"}
_PIPE_CLOSED: Final = 128 + 13  # as a shell says it of SIGPIPE
_INTERRUPTED: Final = 128 + 2
_WRONG: Final = 2
_FULL: Final = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO))


class HexgenError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(HexgenError, ValueError):
    """An option has a value that cannot work; ``str()`` is one sentence naming it."""


class BadRequest(HexgenError):  # noqa: N818 - named after the HTTP status it becomes
    """A request is malformed.

    Attributes:
        param: the field or header at fault, or ``None``.
        status: HTTP status, 400 unless the model is unknown (404) or the body too large (413).
        code: machine-readable code of the OpenAI error object.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code


class Refused(HexgenError):  # noqa: N818 - an answer, not a defect
    """No engine takes the call now.

    Attributes:
        reason: one word of the overload vocabulary, such as ``rejected-no-endpoints``.
        status: HTTP status, 503 for "nobody there", 429 for "too much work".
        retry_after_s: hint for the client, seconds.
    """

    def __init__(
        self, message: str, *, reason: str, status: int = 503, retry_after_s: float = 1.0
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.status = status
        self.retry_after_s = retry_after_s


class UnsupportedVLLM(HexgenError, RuntimeError):  # noqa: N818
    """The installed vLLM is outside the supported range or lacks a seam we need."""


def error_object(
    message: str, status: int, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return the OpenAI error object of an answer with that HTTP status."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


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
