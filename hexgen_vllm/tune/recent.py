"""The workflows that a router remembers for its tuner.

What one is, and how it is written, is in :mod:`hexgen_vllm.recorded`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from hexgen_vllm.recorded import (
    MAX_CALLS,
    RecentCall,
    RecentWorkflow,
    parse,
)

__all__ = ["MAX_CALLS", "RecentCall", "RecentWorkflow", "Ring", "parse"]


class Ring:
    """The last ``size`` workflows.

    Memory is bounded: a workflow with more than :data:`MAX_CALLS` calls is not kept.
    """

    def __init__(self, size: int = 2000) -> None:
        self._kept: deque[RecentWorkflow] = deque(maxlen=size)
        self.seen = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[RecentWorkflow]:
        return iter(self._kept)

    def add(self, workflow: RecentWorkflow) -> None:
        """Keep a workflow; the oldest one goes when the ring is full."""
        if 0 < len(workflow.calls) <= MAX_CALLS:
            self.seen += 1
            self._kept.append(workflow)

    def text(self) -> str:
        """Return all of them as JSON lines; another thread may add some meanwhile."""
        return "".join(f"{workflow.line()}\n" for workflow in list(self._kept))
