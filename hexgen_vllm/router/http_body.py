"""Bodies of requests: what was compressed, in the clear."""

from __future__ import annotations

import zlib
from typing import Final

from aiohttp import web

_WINDOWS: Final = {"gzip": 31, "x-gzip": 31, "deflate": 47}
_RAW_DEFLATE: Final = -15
MOST_INFLATED: Final = 64 * 2**20
"""Bytes that a compressed body may grow to, whatever may be sent in the clear: half a megabyte of
zeros holds a thousand times as much, and all of it would be read between two other calls."""


def in_the_clear(raw: bytes, encoding: str, most: int) -> bytes:
    """Return what ``raw`` holds.

    Args:
        raw: a whole body.
        encoding: how it is compressed, as ``Content-Encoding`` says it.
        most: bytes that it may hold, up to :data:`MOST_INFLATED` if it is compressed.

    Raises:
        HTTPRequestEntityTooLarge: it holds more.
        RequestPayloadError: it is not compressed as it says.
    """
    if encoding == "identity" or not raw:
        return raw
    window = _WINDOWS.get(encoding)
    if window is None:
        raise web.RequestPayloadError(f"no such encoding: {encoding}")
    most = min(most, MOST_INFLATED)
    for bits in (window, _RAW_DEFLATE) if encoding == "deflate" else (window,):
        tool = zlib.decompressobj(bits)
        try:
            found = tool.decompress(raw, most + 1)
        except zlib.error:
            continue
        if len(found) > most:
            raise web.HTTPRequestEntityTooLarge(most, len(found))
        if tool.eof:
            return found
    raise web.RequestPayloadError("the body is not compressed as it says")
