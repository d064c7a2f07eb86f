"""What can go wrong between the router and an engine, and between it and a client.

In a module of their own: a subclass of :class:`OSError` cannot be compiled.
"""

from __future__ import annotations


class EngineBroke(ConnectionError):  # noqa: N818 - named after what happened
    """An engine closed the connection before the end of an answer, or does not speak HTTP."""


class CannotConnect(OSError):  # noqa: N818 - named after what happened
    """Nobody answers at an engine's address."""
