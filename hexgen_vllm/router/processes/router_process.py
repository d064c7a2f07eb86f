"""Which of several router processes one is, and which one a workflow belongs to."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

PROCESS_HEADER: Final = "x-hexgen-process"
"""Says which process answered."""


@dataclass(frozen=True, slots=True)
class RouterProcess:
    """Which of the processes this is.

    Attributes:
        index: from 0.
        count: number of processes.
        folder: where their Unix sockets are; only their user may enter it.
    """

    index: int
    count: int
    folder: str

    def socket(self, index: int | None = None) -> str:
        """Return the path of a process's socket, by default this one's."""
        return f"{self.folder}/{self.index if index is None else index}.sock"

    def owner(self, workflow_id: str) -> int:
        """Return the process that a workflow belongs to."""
        digest = hashlib.blake2b(workflow_id.encode("utf-8", "replace"), digest_size=8).digest()
        return int.from_bytes(digest, "big") % self.count

    def others(self) -> list[int]:
        """Return all other processes."""
        return [i for i in range(self.count) if i != self.index]
