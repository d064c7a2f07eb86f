"""The page at ``/ui``: one document without anything from elsewhere, under a strict policy."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Final

from aiohttp import web

from hexgen_vllm.router.context import Context
from hexgen_vllm.router.http_request import Request
from hexgen_vllm.router.overview import Overview

PATH: Final = "/ui"
DATA_PATH: Final = "/ui/data"


class UiPage:
    """Handlers of the page and of what it shows."""

    def __init__(self, context: Context) -> None:
        self._overview = Overview(context)
        self._page, self._policy = document()

    async def page(self, request: Request) -> web.StreamResponse:
        """Show the page; it needs no key, what it asks for does."""
        headers = {
            "Cache-Control": "no-cache",
            "Content-Security-Policy": self._policy,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
        }
        return web.Response(
            body=self._page, content_type="text/html", charset="utf-8", headers=headers
        )

    async def data(self, request: Request) -> web.StreamResponse:
        """Say what the page shows now."""
        return data_response(self._overview.body())


def data_response(body: bytes) -> web.Response:
    """Return the answer that says what the page shows."""
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    return web.Response(body=body, content_type="application/json", headers=headers)


def document() -> tuple[bytes, str]:
    """Return the page and its content security policy.

    Only the page's own style and script may run, and they may only talk to this router.
    """
    folder = resources.files("hexgen_vllm.router") / "ui"
    page, style, script = (
        (folder / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")
    )
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; "
        f"style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page.replace("{style}", style).replace("{script}", script).encode(), policy


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
