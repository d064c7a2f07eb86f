"""Who may ask for what: client keys and admin keys.

A key is shown as ``Authorization: Bearer KEY``, the scheme in any case and any blanks around the
key, or as Anthropic's SDKs do, ``x-api-key: KEY``.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping
from typing import Final

from aiohttp import web

from hexgen_vllm.router import answers
from hexgen_vllm.router.http_request import Request
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.router.routes import Access

KEY_HEADER: Final = "x-api-key"


class Keys:
    """Checks keys.

    Attributes:
        wanted: whether clients need a key.

    Args:
        options: the keys, and whether admin routes are open.
    """

    def __init__(self, options: RouterOptions) -> None:
        self._client, self._admin = _encoded(options.api_key), _encoded(options.admin_api_key)
        self.wanted = bool(self._client)
        self._everybody = options.allow_unauthenticated_admin
        self._origins = frozenset(options.allowed_origins)

    def refusal(self, request: Request, access: Access) -> web.Response | None:
        """Return the answer to a request that may not pass, ``None`` if it may."""
        if access is Access.ADMIN:
            return self._admin_refusal(request)
        if not self.wanted or access is not Access.CLIENT:
            return None
        shown = shown_keys(request.names)
        if _one_of(shown, self._client) | _one_of(shown, self._admin):
            return None
        return _no_key("A valid API key is needed.")

    def _admin_refusal(self, request: Request) -> web.Response | None:
        if self._admin:
            known = _one_of(shown_keys(request.names), self._admin)
            return None if known else _no_key("A valid admin API key is needed.")
        if not self._everybody:
            text = "Admin endpoints are off: the router has no admin API key."
            return answers.error_response(text, 403, code="admin_disabled")
        origin = request.headers.get("Origin")
        if origin is not None and origin not in self._origins:
            # A page that a browser on this network shows is not the operator.
            text = "Web pages may not use admin endpoints."
            return answers.error_response(text, 403, code="origin_not_allowed")
        return None


def shown_keys(names: Mapping[str, str]) -> list[str]:
    """Return the keys that a request shows, from its headers by lower-case name."""
    scheme, _, key = names.get("authorization", "").strip().partition(" ")
    shown = [key.strip()] if scheme.lower() == "bearer" else []
    other = names.get(KEY_HEADER, "").strip()
    return [key for key in (*shown, other) if key]


def _encoded(keys: Iterable[str]) -> tuple[bytes, ...]:
    return tuple(key.encode() for key in keys)


def _one_of(shown: Iterable[str], keys: tuple[bytes, ...]) -> bool:
    # Every key is compared: the time must not tell which one came close.
    pairs = [(one.encode("utf-8", "surrogateescape"), key) for one in shown for key in keys]
    return sum(hmac.compare_digest(one, key) for one, key in pairs) > 0


def _no_key(text: str) -> web.Response:
    headers = {"WWW-Authenticate": "Bearer"}
    return answers.error_response(text, 401, code="invalid_api_key", headers=headers)
