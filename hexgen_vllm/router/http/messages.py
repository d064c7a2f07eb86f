"""What all of HTTP is made of: header names, bodies in the clear, work beside the event loop.

The event loop serves all clients, so it does nothing for one of them that takes long. Work on more
than :data:`LARGE_BYTES` goes to :func:`aside`.
"""

from __future__ import annotations

import asyncio
import json
import traceback
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol, TypeVar

from aiohttp import web
from aiohttp.helpers import rfc822_formatted_time

REQUEST_ID_HEADER: Final = "x-request-id"
SERVER: Final = "hexgen-vllm"
_FRAMING = frozenset(("content-length", "connection"))
LARGE_BYTES: Final = 32 * 1024
"""Size from which a body is worked on beside the event loop.

The worst JSON of this size, lists of nothing, takes 5 ms to decode and to look through (Python
3.11, 2 GHz); text takes 0.1 ms. To change threads costs 0.1 ms.
"""
MOST_INFLATED: Final = 64 * 2**20
"""Bytes that a compressed body may grow to, whatever may be sent in the clear."""
_MOST_RATIO: Final = 200  # JSON of real calls has 3 to 20, of one prompt many times over 100
_NO_RATIO_BYTES: Final = 2**20  # up to here any ratio is good
_WINDOWS: Final = {"gzip": 31, "x-gzip": 31, "deflate": 47}
_RAW_DEFLATE: Final = -15
# One that works while another one waits for memory; more would only take turns.
_THREADS: Final = ThreadPoolExecutor(2, thread_name_prefix="hexgen-body")
SENT: Final = web.Response()
"""What a handler returns that has written the answer itself."""


def parts(response: web.StreamResponse) -> tuple[list[bytes], bytes]:
    """Return the header lines of ``response``, without a length, and its body."""
    body = response.body if isinstance(response, web.Response) else None
    content = bytes(body) if isinstance(body, bytes | bytearray) else b""
    headers = response.headers
    headers.setdefault("Server", SERVER)
    headers.setdefault("Date", rfc822_formatted_time())
    if content:
        headers.setdefault("Content-Type", "application/octet-stream")
    kept = ((k, v) for k, v in headers.items() if k.lower() not in _FRAMING)
    return [f"{k}: {v}\r\n".encode("utf-8", "surrogateescape") for k, v in kept], content


def json_response(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    """Return an answer that says ``content``."""
    shown = {"Content-Type": "application/json", **(headers or {})}
    return web.Response(status=status, body=json.dumps(content).encode(), headers=shown)


_Result = TypeVar("_Result")
Pieces = Sequence[bytes | bytearray]


class LateBody(Exception):  # noqa: N818 - named after what happened
    """A body did not arrive in time."""


async def aside(work: Callable[..., _Result], *args: object) -> _Result:
    """Return ``work(*args)``, done beside the event loop; it must touch nothing that is shared."""
    return await asyncio.get_running_loop().run_in_executor(_THREADS, _work, work, args)


def _work(work: Callable[..., _Result], args: tuple[object, ...]) -> _Result:
    try:
        return work(*args)
    except Exception as error:
        # What the frames hold ends here, too: the event loop would free it with the error.
        found: BaseException | None = error
        while found is not None:
            traceback.clear_frames(found.__traceback__)
            found = found.__context__
        raise


async def in_the_clear(pieces: Pieces, size: int, encoding: str, most: int) -> bytes:
    """Return the body that came in ``pieces``.

    Args:
        pieces: all of it.
        size: bytes of all pieces.
        encoding: how it is compressed, as ``Content-Encoding`` says it.
        most: bytes that it may hold, up to :data:`MOST_INFLATED` if it is compressed.

    Raises:
        HTTPRequestEntityTooLarge: it holds more.
        RequestPayloadError: it is not compressed as it says.
    """
    if size > LARGE_BYTES:
        return await aside(_clear, pieces, encoding, most)
    if encoding == "identity" or not size:
        return b"".join(pieces)
    try:
        return _clear(pieces, encoding, min(most, LARGE_BYTES))
    except web.HTTPRequestEntityTooLarge:
        if most <= LARGE_BYTES:
            raise
        return await aside(_clear, pieces, encoding, most)


def _clear(pieces: Pieces, encoding: str, most: int) -> bytes:
    raw = b"".join(pieces)
    if encoding == "identity":
        return raw
    window = _WINDOWS.get(encoding)
    if window is None:
        raise web.RequestPayloadError(f"no such encoding: {encoding}")
    most = min(most, MOST_INFLATED, max(_MOST_RATIO * len(raw), _NO_RATIO_BYTES))
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


Pairs = list[tuple[bytes, bytes]]


class HeaderMap(dict[str, str]):
    """Header values by lower-case name, the first one of each."""

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> HeaderMap:
        """Return the names of ``headers``."""
        return cls((name.lower(), headers[name]) for name in headers)


class Buffered:
    """Bytes of requests' bodies that a server holds at once.

    Attributes:
        size: bytes there are.
        most: bytes there may be.
    """

    def __init__(self, most: int) -> None:
        self.size, self.most = 0, most


class Source(Protocol):
    """What an answer comes from; it can be told to wait."""

    def pause(self) -> None:
        """Read no more for now."""

    def resume(self) -> None:
        """Read on."""
