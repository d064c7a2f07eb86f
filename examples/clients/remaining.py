"""Headers of one workflow for clients that can add headers to a call."""

from __future__ import annotations

import time
import uuid


class Headers:
    """Headers of one workflow, whose deadline counts from here.

    Args:
        type: name under which such workflows are learned.
        deadline_s: seconds that all calls together have.
    """

    def __init__(self, type: str, deadline_s: float) -> None:
        self._fixed = {"x-hexgen-workflow-id": uuid.uuid4().hex, "x-hexgen-workflow-type": type}
        self._until_s = time.monotonic() + deadline_s

    def of(self, stage: str, *, final: bool = False) -> dict[str, str]:
        """Return the headers of a call that is made now; ``final`` says that none follows."""
        left_ms = max(1000 * (self._until_s - time.monotonic()), 1.0)
        last = {"x-hexgen-workflow-final": "1"} if final else {}
        deadline = {"x-hexgen-workflow-deadline-ms": f"{left_ms:.0f}", "x-hexgen-stage": stage}
        return {**self._fixed, **deadline, **last}
