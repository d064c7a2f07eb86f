"""Who may ask for what: client keys and admin keys."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from aiohttp import web

from hexgen_vllm.router import answers
from hexgen_vllm.router.http_request import Request
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.router.routes import Access


class Keys:
    """Checks bearer keys.

    Attributes:
        wanted: whether clients need a key.

    Args:
        options: the keys, and whether admin routes are open.
    """

    def __init__(self, options: RouterOptions) -> None:
        self._client, self._admin = _bearers(options.api_key), _bearers(options.admin_api_key)
        self.wanted = bool(self._client)
        self._everybody = options.allow_unauthenticated_admin
        self._origins = frozenset(options.allowed_origins)

    def refusal(self, request: Request, access: Access) -> web.Response | None:
        """Return the answer to a request that may not pass, ``None`` if it may."""
        if access is Access.ADMIN:
            return self._admin_refusal(request)
        if not self.wanted or access is not Access.CLIENT:
            return None
        if _shows(request, self._client) | _shows(request, self._admin):
            return None
        return _no_key("A valid API key is needed.")

    def _admin_refusal(self, request: Request) -> web.Response | None:
        if self._admin:
            shown = _shows(request, self._admin)
            return None if shown else _no_key("A valid admin API key is needed.")
        if not self._everybody:
            text = "Admin endpoints are off: the router has no admin API key."
            return answers.error_response(text, 403, code="admin_disabled")
        origin = request.headers.get("Origin")
        if origin is not None and origin not in self._origins:
            # A page that a browser on this network shows is not the operator.
            text = "Web pages may not use admin endpoints."
            return answers.error_response(text, 403, code="origin_not_allowed")
        return None


def _bearers(keys: Iterable[str]) -> tuple[bytes, ...]:
    return tuple(f"Bearer {key}".encode() for key in keys)


def _shows(request: Request, keys: tuple[bytes, ...]) -> bool:
    shown = request.names.get("authorization", "").encode("utf-8", "surrogateescape")
    # Every key is compared: the time must not tell which one came close.
    return sum(hmac.compare_digest(shown, key) for key in keys) > 0


def _no_key(text: str) -> web.Response:
    headers = {"WWW-Authenticate": "Bearer"}
    return answers.error_response(text, 401, code="invalid_api_key", headers=headers)
