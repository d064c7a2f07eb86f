"""File descriptors of this process: as many as it may have, and how many connections they are for.

Every connection takes one, a call two: one to its client and one to its engine.
"""

from __future__ import annotations

import resource
from typing import Final

_MOST: Final = 2**20  # beyond, some systems make every new process walk through all of them
_LEAST_KEPT: Final = 64
_KEPT_SHARE: Final = 8


def raise_limit() -> int:
    """Raise the soft limit of descriptors to the hard one; return the limit then in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):  # some systems say that more is allowed than is
            return soft
        return wanted
    return _MOST if soft == resource.RLIM_INFINITY else soft


def connections_for(limit: int) -> int:
    """Return how many clients may be connected to a process that may have ``limit`` descriptors.

    An eighth, and no fewer than 64, is kept for engines' health checks, discovery, logs and what
    is being closed; half of the rest is for the connections to engines that calls need.
    """
    return max((limit - max(_LEAST_KEPT, limit // _KEPT_SHARE)) // 2, 1)
