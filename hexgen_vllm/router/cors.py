"""Cross-origin requests: which web pages may call the router from a browser."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from hexgen_vllm.router.http_request import Request
from hexgen_vllm.router.options import RouterOptions

_METHODS: Final = "DELETE, GET, HEAD, OPTIONS, POST"
_EXPOSED: Final = "Retry-After, X-Request-ID, x-hexgen-engine, x-llm-d-request-dropped-reason"
_MAX_AGE_S: Final = 600


class Cors:
    """Adds the headers that browsers ask for.

    Args:
        options: the origins.
    """

    def __init__(self, options: RouterOptions) -> None:
        self._origins = frozenset(options.allowed_origins)
        self._credentials = options.allow_credentials

    @property
    def enabled(self) -> bool:
        """Whether any page may call."""
        return bool(self._origins)

    def preflight(self, request: Request) -> web.Response | None:
        """Return the answer to a preflight request, ``None`` if ``request`` is none."""
        asked = request.headers.get("Access-Control-Request-Method")
        if request.method != "OPTIONS" or asked is None or not self.enabled:
            return None
        headers = {
            "Access-Control-Allow-Methods": _METHODS,
            "Access-Control-Allow-Headers": request.headers.get(
                "Access-Control-Request-Headers", ""
            ),
            "Access-Control-Max-Age": str(_MAX_AGE_S),
        }
        return web.Response(status=204, headers=headers)

    def mark(self, request: Request, response: web.StreamResponse) -> None:
        """Add to ``response``, before it is sent, what lets the asking page read it."""
        origin = request.headers.get("Origin")
        if origin is None or not (origin in self._origins or "*" in self._origins):
            return
        headers = response.headers
        everybody = "*" in self._origins and not self._credentials
        headers["Access-Control-Allow-Origin"] = "*" if everybody else origin
        headers["Access-Control-Expose-Headers"] = _EXPOSED
        if not everybody:
            headers.add("Vary", "Origin")
        if self._credentials:
            headers["Access-Control-Allow-Credentials"] = "true"
