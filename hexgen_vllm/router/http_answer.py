"""Answers that are made here, not passed on: what is written of them."""

from __future__ import annotations

from aiohttp import web
from aiohttp.helpers import rfc822_formatted_time

from hexgen_vllm.router import outbound

_FRAMING = frozenset(("content-length", "connection"))


def parts(response: web.StreamResponse) -> tuple[list[bytes], bytes]:
    """Return the header lines of ``response``, without a length, and its body."""
    body = response.body if isinstance(response, web.Response) else None
    content = bytes(body) if isinstance(body, bytes | bytearray) else b""
    headers = response.headers
    headers.setdefault("Server", outbound.SERVER)
    headers.setdefault("Date", rfc822_formatted_time())
    if content:
        headers.setdefault("Content-Type", "application/octet-stream")
    kept = ((k, v) for k, v in headers.items() if k.lower() not in _FRAMING)
    return [f"{k}: {v}\r\n".encode("utf-8", "surrogateescape") for k, v in kept], content
