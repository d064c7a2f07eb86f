"""Which engine has which stored response: what follows one must go where it is.

Where ids belong to tenants, a response is known by its own and its tenant's: that of another tenant
is not there.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Final
from urllib.parse import unquote

MAX_RESPONSES: Final = 2**16
KEPT_S: Final = 24 * 3600.0
PATH: Final = "/v1/responses/"
_FOLDER: Final = "responses"
_MAX_ID: Final = 256
_ID: Final = re.compile(rb'"id"\s*:\s*"(resp[\w-]{1,250})"')
_WORD: Final = re.compile(r"resp[\w-]{1,250}", re.A)
_LOOKED_AT: Final = 4096


class Stored:
    """Engines of responses, by id; the longest unused are forgotten."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def note(self, response: str, engine: str, now: float) -> None:
        """Note which engine has a response."""
        self._known[response] = engine, now
        self._known.move_to_end(response)
        if len(self._known) > MAX_RESPONSES:
            self._known.popitem(last=False)

    def engine_of(self, response: str, now: float) -> str | None:
        """Return the name of the engine that has a response, ``None`` if that is not known."""
        found = self._known.get(response)
        if found is None or now - found[1] > KEPT_S:
            self._known.pop(response, None)
            return None
        self._known[response] = found[0], now
        self._known.move_to_end(response)
        return found[0]


def is_id(response: str) -> bool:
    """Whether ``response`` looks like the id of one."""
    return _WORD.fullmatch(response) is not None


def told(answer: bytes) -> str | None:
    """Return the response that ``answer``, or the event that it begins with, is about."""
    found = _ID.search(answer, 0, _LOOKED_AT)
    return None if found is None else found[1].decode()


def response_named(path: str) -> str | None:
    """Return the response that a path is about, however it is written, if it is about one."""
    if _FOLDER not in path and "%" not in path:
        return None
    for _ in range(3):  # an engine may stand behind something that decodes, too
        path = unquote(path)
    segments = [s for s in re.split(r"[/\\;?]+", path) if s and s != "."]
    if _FOLDER not in segments[:-1]:
        return None
    return segments[segments.index(_FOLDER) + 1][:_MAX_ID]
