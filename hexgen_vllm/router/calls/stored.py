"""Which engine has which stored response or conversation: what follows one must go where it is.

Where ids belong to tenants, one is known by its own and its tenant's: that of another tenant is not
there.
"""

from __future__ import annotations

import itertools
import re
from collections import OrderedDict
from typing import Final
from urllib.parse import unquote

MAX_RESPONSES: Final = 2**16
KEPT_S: Final = 24 * 3600.0
PATH: Final = "/v1/responses/"
CONVERSATIONS: Final = "/v1/conversations"
_FOLDERS: Final = frozenset(("responses", "conversations"))
_MAX_ID: Final = 256
RESPONSE_ID: Final = re.compile(rb'"id"\s*:\s*"(resp[\w-]{1,250})"')
CONVERSATION_ID: Final = re.compile(rb'"id"\s*:\s*"(conv[\w-]{1,250})"')
_WORD: Final = re.compile(r"(?:resp|conv)[\w-]{1,250}", re.A)
_LOOKED_AT: Final = 4096


class Stored:
    """Engines of responses and conversations, by id; the longest unused are forgotten."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def note(self, response: str, engine: str, now: float) -> None:
        """Note which engine has one."""
        self._known[response] = engine, now
        self._known.move_to_end(response)
        if len(self._known) > MAX_RESPONSES:
            self._known.popitem(last=False)

    def engine_of(self, response: str, now: float) -> str | None:
        """Return the name of the engine that has one, ``None`` if that is not known."""
        found = self._known.get(response)
        if found is None or now - found[1] > KEPT_S:
            self._known.pop(response, None)
            return None
        self._known[response] = found[0], now
        self._known.move_to_end(response)
        return found[0]


def path_of(stored_id: str) -> str | None:
    """Return where an engine shows what has this id, ``None`` if it looks like none."""
    if _WORD.fullmatch(stored_id) is None:
        return None
    return (f"{CONVERSATIONS}/" if is_conversation(stored_id) else PATH) + stored_id


def is_conversation(stored_id: str) -> bool:
    """Whether an id looks like that of a conversation."""
    return stored_id.startswith("conv")


def told(answer: bytes, ids: re.Pattern[bytes]) -> str | None:
    """Return the id of what ``answer``, or the event that it begins with, is about."""
    found = ids.search(answer, 0, _LOOKED_AT)
    return None if found is None else found[1].decode()


def stored_id(path: str) -> str | None:
    """Return what a path is about, however it is written, if that is stored somewhere."""
    if "%" not in path and not any(folder in path for folder in _FOLDERS):
        return None
    for _ in range(3):  # an engine may stand behind something that decodes, too
        path = unquote(path)
    segments = [s for s in re.split(r"[/\\;?]+", path) if s and s != "."]
    for folder, name in itertools.pairwise(segments):
        if folder in _FOLDERS:
            return name[:_MAX_ID]
    return None
