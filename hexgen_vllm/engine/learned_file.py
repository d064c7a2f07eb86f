"""What an engine has learned of its calls, kept across restarts in a JSON file.

It is written every minute and at the end, by a thread of its own, and put in place whole. A file
that cannot be read or written costs a warning and nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path
from typing import Any, Final

from hexgen_vllm.policy.outlook import Outlooks
from hexgen_vllm.wire import from_json

logger = logging.getLogger("vllm.hexgen")

_FORMAT: Final = 1
_EVERY_S: Final = 60.0
_MOST_BYTES: Final = 64 << 20


class LearnedFile:
    """Keeps the shapes of ``outlooks`` in a file.

    Args:
        path: the file; what it holds is taken in.
        outlooks: what learns.
    """

    def __init__(self, path: Path, outlooks: Outlooks) -> None:
        self._path, self._outlooks = path, outlooks
        self._saved_s: float | None = None
        self._thread: threading.Thread | None = None
        self._failed = False
        self._load()

    def tick(self, now: float) -> None:
        """Write the file if it is time and the last writing has ended; ``now`` in seconds."""
        if self._saved_s is None:
            self._saved_s = now
        if now - self._saved_s < _EVERY_S or (self._thread and self._thread.is_alive()):
            return
        self._saved_s = now
        values = self._values()
        self._thread = threading.Thread(target=self._write, args=(values,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write the file a last time."""
        if self._thread is not None:
            self._thread.join()
        self._write(self._values())

    def _values(self) -> dict[str, Any]:
        return {"format": _FORMAT, "shapes": self._outlooks.shapes.export()}

    def _load(self) -> None:
        try:
            if self._path.stat().st_size > _MOST_BYTES:
                raise ValueError("it is too large")
            values = from_json(self._path.read_bytes())
            if not isinstance(values, dict) or values.get("format") != _FORMAT:
                raise ValueError("it has another format")
            self._outlooks.shapes.restore(values.get("shapes"))
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            logger.warning("%s is not used: %s. What it held is learned anew.", self._path, error)

    def _write(self, values: dict[str, Any]) -> None:
        scratch = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        try:
            scratch.write_text(json.dumps(values, separators=(",", ":")))
            scratch.replace(self._path)
            self._failed = False
        except OSError as error:
            if not self._failed:
                logger.warning("What was learned cannot be kept in %s: %s.", self._path, error)
            self._failed = True
