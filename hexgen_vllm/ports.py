"""Ports of this machine."""

from __future__ import annotations

import contextlib
import socket


def free_ports(host: str, count: int) -> list[int]:
    """Return ``count`` different ports that nobody listens on at ``host`` right now."""
    with contextlib.ExitStack() as held:  # all held at once, or one port could come twice
        return [_bound(host, held) for _ in range(count)]


def _bound(host: str, held: contextlib.ExitStack) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = held.enter_context(socket.socket(family, socket.SOCK_STREAM))
    listener.bind((host, 0))
    return int(listener.getsockname()[1])
