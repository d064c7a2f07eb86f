"""Who may ask for what: client keys and admin keys, web pages of other origins, TLS.

A key is shown as ``Authorization: Bearer KEY``, the scheme in any case and any blanks around the
key, or as Anthropic's SDKs do, ``x-api-key: KEY``.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.keys import bearer, digest
from hexgen_vllm.policy.claims import MAX_PRIORITY, Ceiling
from hexgen_vllm.router import errors
from hexgen_vllm.router.http.request import Request
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.router.route import Access, Route
from hexgen_vllm.router.tenants import (
    ALL_TENANTS,
    ANYBODY,
    DEFAULT_TENANT,
    Client,
    read_keys,
)

_METHODS: Final = "DELETE, GET, HEAD, OPTIONS, POST"
_EXPOSED: Final = "Retry-After, X-Request-ID, x-hexgen-engine, x-llm-d-request-dropped-reason"
_MAX_AGE_S: Final = 600
KEY_HEADER: Final = "x-api-key"


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


class Keys:
    """Checks keys, and says whose they are.

    Only digests of keys are kept, and looked up.

    Attributes:
        wanted: whether clients need a key.
        weights: of tenants, as the file of keys gives them.

    Args:
        options: the keys, and whether admin routes are open.

    Raises:
        ConfigError: the file of keys cannot be read, or is wrong.
    """

    def __init__(self, options: RouterOptions) -> None:
        entries = () if options.api_keys is None else read_keys(Path(options.api_keys)).keys
        plain = sorted({digest(key) for key in options.api_key})
        alone = len(plain) <= 1 and not entries
        self.wanted = bool(plain or entries)
        self._operator = Client(
            DEFAULT_TENANT, frozenset((ALL_TENANTS,)), admin=True, scoped=not alone
        )
        self._clients: dict[bytes, Client] = {
            one: self._plain(one, alone, options) for one in plain
        }
        self._clients |= {one.digest(): one.client() for one in entries}
        self._clients |= dict.fromkeys(map(digest, options.admin_api_key), self._operator)
        tenants = {one.tenant for one in self._clients.values() if not one.admin}
        self._shared = bool(entries) or len(tenants) > 1
        self._anybody = Client(
            ceiling=_ceiling(options, MAX_PRIORITY),
            sees_all=not self._shared or options.allow_unauthenticated_admin,
        )
        if self._anybody == ANYBODY:
            self._anybody = ANYBODY
        self._has_admin = any(one.admin for one in self._clients.values())
        self.weights: Mapping[str, float] = {
            one.tenant: one.weight for one in entries if one.weight is not None
        }
        self._everybody = options.allow_unauthenticated_admin
        self._origins = frozenset(options.allowed_origins)

    @staticmethod
    def _plain(key: bytes, alone: bool, options: RouterOptions) -> Client:
        """Return who shows a key of the plain list."""
        if alone:
            return Client(DEFAULT_TENANT, ceiling=_ceiling(options, MAX_PRIORITY))
        name, most = f"key-{key.hex()[:8]}", _ceiling(options, 0)
        return Client(name, ceiling=most, sees_all=False, scoped=True)

    def client(self, request: Request) -> Client:
        """Return who asks; whoever shows no known key is anybody."""
        if not self._clients:
            return self._anybody
        return self._known(request) or self._anybody

    def refusal(self, request: Request, route: Route[Any]) -> web.Response | None:
        """Return the answer to a request that may not pass, ``None`` if it may."""
        if route.access is Access.ADMIN:
            return self._admin_refusal(request)
        if not self.wanted or route.access is not Access.CLIENT:
            return None
        if self._known(request) is None:
            return _no_key("A valid API key is needed.")
        return self._admin_refusal(request) if route.shows_tenants and self._shared else None

    def _known(self, request: Request) -> Client | None:
        found = (self._clients.get(digest(key)) for key in shown_keys(request.names))
        known = [one for one in found if one is not None]
        return next((one for one in known if one.admin), known[0]) if known else None

    def _admin_refusal(self, request: Request) -> web.Response | None:
        if self._has_admin:
            known = self._known(request)
            admin = known is not None and known.admin
            return None if admin else _no_key("A valid admin API key is needed.")
        if not self._everybody:
            text = "Admin endpoints are off: the router has no admin API key."
            return errors.error_response(text, 403, code="admin_disabled")
        origin = request.headers.get("Origin")
        if origin is not None and origin not in self._origins:
            # A page that a browser on this network shows is not the operator.
            text = "Web pages may not use admin endpoints."
            return errors.error_response(text, 403, code="origin_not_allowed")
        return None


def _ceiling(options: RouterOptions, max_priority: int) -> Ceiling:
    most = options.max_priority
    return Ceiling(max_priority if most is None else most, options.min_deadline_ms / 1000.0)


def shown_keys(names: Mapping[str, str]) -> list[str]:
    """Return the keys that a request shows, from its headers by lower-case name."""
    shown = bearer(names.get("authorization", "")), names.get(KEY_HEADER, "").strip()
    return [key for key in shown if key]


def _no_key(text: str) -> web.Response:
    headers = {"WWW-Authenticate": "Bearer"}
    return errors.error_response(text, 401, code="invalid_api_key", headers=headers)


def for_clients(options: RouterOptions) -> ssl.SSLContext | None:
    """Return what the router serves HTTPS with, ``None`` for HTTP.

    Raises:
        ConfigError: a file does not hold what it should.
    """
    if options.ssl_certfile is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(options.ssl_certfile, options.ssl_keyfile, password=_no_password)
        if options.ssl_ca_certs is not None:
            context.load_verify_locations(options.ssl_ca_certs)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ValueError) as error:
        raise _unusable("ssl_certfile, ssl_keyfile and ssl_ca_certs", error) from None
    return context


def for_engines(options: RouterOptions) -> ssl.SSLContext | bool:
    """Return what https engines are checked with; true for the system's authorities.

    Raises:
        ConfigError: the file holds no certificates.
    """
    if options.engine_ssl_ca_certs is None:
        return True
    try:
        return ssl.create_default_context(cafile=options.engine_ssl_ca_certs)
    except OSError as error:
        raise _unusable("engine_ssl_ca_certs", error) from None


def _no_password() -> str:
    raise ValueError("the key is encrypted")  # or OpenSSL would ask at the terminal


def _unusable(names: str, error: Exception) -> ConfigError:
    why = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    return ConfigError(f"{names} cannot be used: {why}.")
