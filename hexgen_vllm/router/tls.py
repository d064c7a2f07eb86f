"""TLS towards clients and towards engines."""

from __future__ import annotations

import ssl

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.router.options import RouterOptions


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
