"""What can go wrong between the router and an engine, and between it and a client.

In a module of their own: a subclass of :class:`OSError` cannot be compiled.
"""

from __future__ import annotations

import os


class EngineBroke(ConnectionError):  # noqa: N818 - named after what happened
    """An engine closed the connection before the end of an answer, or does not speak HTTP."""


class CannotConnect(OSError):  # noqa: N818 - named after what happened
    """Nobody answers at an engine's address."""


def why(error: OSError) -> str:
    """Return what the system says of ``error``, without what a library put around it."""
    if error.errno is not None and error.errno > 0:  # those of names are below
        return os.strerror(error.errno)
    return error.strerror or str(error)
