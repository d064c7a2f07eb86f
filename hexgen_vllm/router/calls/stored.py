"""Which engine has which stored response: what follows one must go where it is."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Final

MAX_RESPONSES: Final = 2**16
KEPT_S: Final = 24 * 3600.0
PATH: Final = "/v1/responses/"
_MAX_ID: Final = 256
_ID: Final = re.compile(rb'"id"\s*:\s*"(resp[\w-]{1,250})"')
_PREVIOUS: Final = re.compile(rb'"previous_response_id"\s*:\s*"([^"\\]{1,256})"')
_WORD: Final = re.compile(r"resp[\w-]{1,250}", re.A)
_LOOKED_AT: Final = 4096


class Stored:
    """Engines of responses, by id; the longest unused are forgotten."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def learn(self, answer: bytes, engine: str, now: float) -> None:
        """Note the response that ``answer``, or the event that it begins with, is about."""
        found = _ID.search(answer, 0, _LOOKED_AT)
        if found is not None:
            self.note(found[1].decode(), engine, now)

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


def previous(body: bytes) -> str | None:
    """Return the response that a request to ``/v1/responses`` follows, if it names one."""
    found = _PREVIOUS.search(body)
    return None if found is None else found[1].decode("utf-8", "replace")


def named(path: str) -> str | None:
    """Return the response that a path is about, if it is about one."""
    if not path.startswith(PATH):
        return None
    return path.removeprefix(PATH).partition("/")[0][:_MAX_ID] or None
