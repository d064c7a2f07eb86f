"""Bodies of requests: what was compressed, in the clear."""

from __future__ import annotations

import zlib
from typing import Final

from aiohttp import web

_WINDOWS: Final = {"gzip": 31, "x-gzip": 31, "deflate": 47}
_RAW_DEFLATE: Final = -15


def in_the_clear(raw: bytes, encoding: str, most: int) -> bytes:
    """Return what ``raw`` holds.

    Args:
        raw: a whole body.
        encoding: how it is compressed, as ``Content-Encoding`` says it.
        most: bytes that it may hold.

    Raises:
        HTTPRequestEntityTooLarge: it holds more.
        RequestPayloadError: it is not compressed as it says.
    """
    if encoding == "identity" or not raw:
        return raw
    window = _WINDOWS.get(encoding)
    if window is None:
        raise web.RequestPayloadError(f"no such encoding: {encoding}")
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
