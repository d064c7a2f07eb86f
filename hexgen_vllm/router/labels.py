"""Names that clients choose, made fit for metrics: only so many of them are told apart."""

from __future__ import annotations

from typing import Final

OTHER: Final = "other"


class Names:
    """Keeps the first ``most`` different names; all others are :data:`OTHER`."""

    __slots__ = ("_known", "_most")

    def __init__(self, most: int) -> None:
        self._known: set[str] = set()
        self._most = most

    def __call__(self, name: str) -> str:
        """Return ``name`` if it is one of those that are told apart."""
        if name in self._known:
            return name
        if len(self._known) >= self._most:
            return OTHER
        self._known.add(name)
        return name
