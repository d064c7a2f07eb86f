"""Log lines: one per event, as text for people or as JSON for machines.

Messages are written as ``event key=%s key=%d``. As JSON the keys become fields with the values'
own types, so that nobody has to parse them. No line carries prompt or answer text.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any, Final, cast

FORMATS: Final = ("text", "json")
_TEXT: Final = "%(asctime)s %(levelname)s %(name)s %(message)s"
_PLACE: Final = re.compile(r"(?:\s*\b(?P<key>\w+)=)?(?P<form>%(?:\.\d+)?[a-z])|%%")


def set_up(level: str, form: str) -> None:
    """Log messages of ``level`` and worse to standard error in the format ``form``."""
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(form))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def formatter(form: str) -> logging.Formatter:
    """Return what writes records in the format ``form``."""
    return cast(logging.Formatter, JsonFormatter()) if form == "json" else logging.Formatter(_TEXT)


class JsonFormatter:
    """Writes a record as one line of JSON: time (Unix, seconds), level, logger, event, fields.

    Handlers take it for a :class:`logging.Formatter`.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        line |= _fields(record)
        if record.exc_info:
            line["exception"] = logging.Formatter().formatException(record.exc_info)
        return json.dumps(line, default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return event and fields; a value without a key is a word of the event."""
    if not isinstance(record.args, tuple):
        return {"event": record.getMessage()}
    values, fields = iter(record.args), dict[str, Any]()

    def filled(match: re.Match[str]) -> str:
        if match["form"] is None:
            return "%"
        value = next(values, None)
        if match["key"] is None:
            return match["form"] % (value,)
        fields[match["key"]] = value
        return ""

    event = _PLACE.sub(filled, str(record.msg)) if record.args else str(record.msg)
    return {"event": event.strip(), **fields}
