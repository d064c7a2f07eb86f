"""What can go wrong between the router and an engine, and between it and a client.

In a module of their own: a subclass of :class:`OSError` cannot be compiled.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from typing import Final

_ERRNO: Final = re.compile(r"\[Errno (-?\d+)\]")
_SHORT: Final = frozenset(
    (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL, errno.EAGAIN)
)
_UNRESOLVED: Final = frozenset((socket.EAI_AGAIN, socket.EAI_MEMORY, socket.EAI_SYSTEM))


class EngineBroke(ConnectionError):  # noqa: N818 - named after what happened
    """An engine closed the connection before the end of an answer, or does not speak HTTP."""


class CannotConnect(OSError):  # noqa: N818 - named after what happened
    """Nobody answers at an engine's address."""


class NoSuchHost(CannotConnect):
    """Nobody knows the name of an engine's host."""


class ConnectTimeout(CannotConnect):
    """An address takes no connection in time: nobody is there, or somebody who is too busy."""


class RouterShort(OSError):  # noqa: N818 - named after what happened
    """This machine has no descriptor, port or memory left; no engine is to blame."""


def is_short(error: BaseException) -> bool:
    """Whether a connection failed for want of something on this side, not on the other one.

    Descriptors of the process (``EMFILE``) and of the system (``ENFILE``), memory of the kernel
    (``ENOBUFS``, ``ENOMEM``), local ports (``EADDRNOTAVAIL``, ``EAGAIN``), and a resolver that
    cannot answer now.
    """
    if isinstance(error, MemoryError | RouterShort):
        return True
    if not isinstance(error, OSError):
        return False
    if isinstance(error, socket.gaierror):
        return error.errno in _UNRESOLVED
    # Errors of several addresses come as one, with their numbers in its text.
    numbers = [error.errno] if error.errno else map(int, _ERRNO.findall(str(error)))
    return any(number in _SHORT for number in numbers)


def why(error: OSError) -> str:
    """Return what the system says of ``error``, without what a library put around it."""
    if error.errno is not None and error.errno > 0:  # those of names are below
        return os.strerror(error.errno)
    return error.strerror or str(error)
