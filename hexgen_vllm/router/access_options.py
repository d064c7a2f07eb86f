"""Options about who may do what, and over which connections. Flag names follow vLLM's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hexgen_vllm.config import option
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.policy.claims import MAX_PRIORITY
from hexgen_vllm.router.hosts import check_patterns
from hexgen_vllm.router.tenants import read_keys
from hexgen_vllm.tune.online import OnlineOptions

KEY_VARIABLES: Final = {
    "api_key": "HEXGEN_ROUTER_API_KEY",
    "admin_api_key": "HEXGEN_ROUTER_ADMIN_API_KEY",
    "engine_api_key": "HEXGEN_ROUTER_ENGINE_API_KEY",
}
"""Environment variables that hold keys, so that none shows in a list of processes."""


@dataclass(frozen=True)
class AccessOptions(OnlineOptions):
    """Keys, TLS, origins, and the hosts that engines may register from."""

    api_key: tuple[str, ...] = option(
        (), f"keys of which clients must present one (or ${KEY_VARIABLES['api_key']})"
    )
    admin_api_key: tuple[str, ...] = option(
        (), f"keys for admin routes, closed without (or ${KEY_VARIABLES['admin_api_key']})"
    )
    api_keys: str | None = option(
        None, "YAML file of keys: whose each is, and the most that its clients can claim"
    )
    max_priority: int | None = option(
        None,
        "highest priority that counts of clients without a key or with one of --api-key; without "
        "limit by default, 0 where there are several keys",
        least=-MAX_PRIORITY,
        most=MAX_PRIORITY,
    )
    min_deadline_ms: float = option(
        0.0, "shortest deadline that counts of those clients, ms", least=0.0
    )
    allow_unauthenticated_admin: bool = option(False, "open admin routes to everybody")
    engine_api_key: str | None = option(
        None,
        f"key presented to engines instead of the client's (or ${KEY_VARIABLES['engine_api_key']})",
    )
    worker_allowed_hosts: tuple[str, ...] = option(
        (),
        "hosts that engines may be registered and discovered on: names with * and ?, addresses, "
        "networks; by default those of --worker-urls and this machine, and wherever discovered",
    )
    allowed_hosts: tuple[str, ...] = option(
        (),
        "names that clients may call a router by (Host) that needs no key and listens on this "
        "machine only, with * and ?; addresses and local names always may",
    )
    ssl_certfile: str | None = option(None, "serve HTTPS with this certificate chain, PEM")
    ssl_keyfile: str | None = option(None, "private key of --ssl-certfile, PEM")
    ssl_ca_certs: str | None = option(
        None, "clients must show a certificate that one of these has signed, PEM"
    )
    engine_ssl_ca_certs: str | None = option(
        None, "authorities that vouch for https engines, PEM; by default the system's"
    )
    allowed_origins: tuple[str, ...] = option(
        (), "web origins whose pages may call the router, * for all (CORS)"
    )
    allow_credentials: bool = option(False, "let those pages send credentials (CORS)")

    def check_access(self) -> None:
        """Check what must fit together.

        Raises:
            ConfigError: it does not.
        """
        check_patterns(self.worker_allowed_hosts)
        if any("/" in name or ":" in name or not name for name in self.allowed_hosts):
            raise ConfigError("allowed_hosts must be names without scheme, port and path.")
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_ca_certs):
            raise ConfigError("ssl_certfile must be given with ssl_keyfile and ssl_ca_certs.")
        if self.allow_credentials and "*" in self.allowed_origins:
            raise ConfigError("allowed_origins must name origins when allow_credentials is set.")
        if any(not key for key in (*self.api_key, *self.admin_api_key)):
            raise ConfigError("api_key and admin_api_key must not be empty.")
        if self.api_keys is not None:
            read_keys(Path(self.api_keys))
        for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "engine_ssl_ca_certs"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise ConfigError(f"{name} must be a file, and {path} is none.")
