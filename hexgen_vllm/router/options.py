"""Options of the router: one flat value, and the groups in which they are shown.

Names follow vllm-router where the meaning is the same; those about keys and TLS follow vLLM's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import urlsplit

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.option import (
    check,
    from_mapping,
    known_names,
    names_of,
    option,
    shared,
    with_current_names,
)
from hexgen_vllm.policy.claims import MAX_PRIORITY
from hexgen_vllm.policy.liveness import Patience
from hexgen_vllm.router.addresses import (
    DnsService,
    check_patterns,
    check_selector,
    parse_server,
)
from hexgen_vllm.router.tenants import read_keys
from hexgen_vllm.tune.online import OnlineOptions
from hexgen_vllm.types import Role

T = TypeVar("T")

KEY_VARIABLES: Final = {
    "api_key": "HEXGEN_ROUTER_API_KEY",
    "admin_api_key": "HEXGEN_ROUTER_ADMIN_API_KEY",
    "engine_api_key": "HEXGEN_ROUTER_ENGINE_API_KEY",
    "replicas": "HEXGEN_ROUTER_REPLICAS",
}
"""Environment variables that hold keys, so that none shows in a list of processes."""

GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "engines": (
        "worker_urls", "worker_allowed_hosts", "stock_scheduling", "intra_node_data_parallel_size",
        "connect_timeout_secs", "stats_interval_secs",
    ),
    "service": (
        "config", "host", "port", "router_workers", "log_level", "log_format", "prometheus_host",
        "prometheus_port", "otlp_traces_endpoint", "shutdown_timeout", "max_payload_size",
        "max_buffered_bytes", "max_connections", "request_id_headers",
    ),
    "placement": (
        "policy", "default_deadline_s", "hold_depth", "prefix_affinity", "externality", "stretch",
        "length_quantile", "slack_quantile", "default_output_tokens", "priority_by", "alpha",
        "paper_form", "beta", "affinity_tokens", "kv_transfer_rate",
    ),
    "keys and TLS": (
        "api_key", "api_keys", "admin_api_key", "engine_api_key", "max_priority",
        "min_deadline_ms", "allow_unauthenticated_admin", "ssl_certfile", "ssl_keyfile",
        "ssl_ca_certs", "engine_ssl_ca_certs", "allowed_hosts", "allowed_origins",
        "allow_credentials",
    ),
    "queue": (
        "queue_size", "queue_timeout_secs", "max_concurrent_requests", "max_held_tokens",
        "max_workflows",
    ),
    "overload": (
        "overload", "fair_window_tokens", "tenant_weights", "entry_margin", "reject_at_entry",
        "hopeless_quantile", "hopeless_pace", "background_share",
    ),
    "retries": (
        "retry_max_retries", "disable_retries", "retry_initial_backoff_ms", "retry_max_backoff_ms",
        "retry_backoff_multiplier", "retry_jitter_factor", "retry_budget_ratio",
        "retry_budget_burst", "migration_limit",
    ),
    "silence": (
        "request_timeout_secs", "stream_stall_timeout_secs", "sse_keep_alive_interval",
        "engine_stall_secs", "engine_stall_steps", "engine_cold_secs", "lost_stream_timeout_secs",
    ),
    "health": (
        "health_check_endpoint", "health_check_interval_secs", "health_check_timeout_secs",
        "health_failure_threshold", "health_success_threshold",
    ),
    "circuit breaker": (
        "disable_circuit_breaker", "cb_failure_threshold", "cb_error_ratio", "cb_least_calls",
        "cb_window_duration_secs", "cb_timeout_duration_secs", "cb_success_threshold",
    ),
    "replicas": ("replicas", "replicas_fleet", "replicas_stale_secs"),
    "discovery": (
        "worker_dns", "worker_dns_records", "worker_dns_server", "worker_dns_refresh_secs",
        "worker_dns_least_refresh_secs", "worker_dns_timeout_secs", "service_discovery",
        "selector", "service_discovery_port", "service_discovery_namespace", "kubeconfig",
    ),
    "batches": (
        "batch_dir", "batch_concurrency", "batch_max_file_bytes", "batch_max_requests",
        "batch_max_bytes", "batch_max_tenant_bytes",
    ),
    "tuning": (
        "tune", "tune_period_s", "tune_drift", "tune_least_s", "tune_workflows", "tune_ring",
        "tune_simulations",
    ),
}  # fmt: skip
"""What ``--help`` and the documentation show together, what is used most first; ``config`` is the
file of options, and what :class:`RouterOptions` lacks is of :class:`DispatchOptions`."""

_WORKER: Final = re.compile(r"(?:(?P<name>[A-Za-z0-9_.-]{1,64})=)?(?P<url>https?://.+)")
TOLD: Final = ("llm-d", "dynamo", "priority", "none")
"""In whose words an engine that is not ours may be told when a call is due."""
_ROLES: Final = tuple(role.value for role in Role)
_PORTS: Final = ("stats_port", "kv_events", "kv_replay")


class Worker(NamedTuple):
    """An engine server: what clients may know it by, and where it is.

    Attributes:
        name: of the engine.
        url: of its server, without a slash at the end.
        stats_port: where on the same host the engine process itself gives its telemetry, if that
            was said.
        deadline: in whose words it is told when a call is due, one of :data:`TOLD`; ``None`` if
            that was not said.
        role: what part of a call it is there for.
        kv_ports: where on the same host it publishes KV events, and sends them again if that was
            said; ``None`` if it does not.
    """

    name: str
    url: str
    stats_port: int | None = None
    deadline: str | None = None
    kv_ports: tuple[int, int | None] | None = None
    role: Role = Role.BOTH


@dataclass(frozen=True)
class RouterOptions:
    """Options of the router and of its tuning; those of placement are ``DispatchOptions``."""

    # Engines
    worker_urls: tuple[str, ...] = option(
        (),
        "engines, as http://host:port or name=http://host:port; ?stats_port=N after it is the "
        "--hexgen-stats-port of one behind vLLM's Rust server, where that is not its default; "
        "?deadline=llm-d, dynamo, priority or none says in whose words one that is not ours is "
        "told when a call is due; ?kv_events=PORT says where it publishes KV events (ZeroMQ), "
        "&kv_replay=PORT where it sends them again; ?role=prefill or decode that it computes "
        "prompts for others to answer, or goes on from prompts of others",
    )
    worker_allowed_hosts: tuple[str, ...] = option(
        (),
        "hosts that engines may be registered and discovered on: names with * and ?, addresses, "
        "networks; by default those of --worker-urls and this machine, and wherever discovered",
    )
    stock_scheduling: str = option(
        "auto",
        "how stock vLLM engines order calls, where they do not say",
        choices=("auto", "fcfs", "priority"),
    )
    intra_node_data_parallel_size: int = option(
        0,
        "data-parallel ranks of engines that do not say how many they have; each rank gets its own"
        " calls, and 1 leaves that choice to all engines",
        least=0,
        most=1024,
    )
    connect_timeout_secs: float = option(
        2.0, "longest wait for a connection to an engine, seconds", least=1e-3
    )
    stats_interval_secs: float = option(
        0.5, "time between readings of an engine's telemetry, seconds", least=1e-2
    )

    # Service
    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(30000, "port to listen on, 0 for a free one", least=0, most=65535)
    router_workers: int = option(
        1, "processes that share the port; each workflow belongs to one of them", least=1, most=64
    )
    log_level: str = option(
        "info", "least severe messages to log", choices=("debug", "info", "warning", "error")
    )
    log_format: str = option(
        "text", "log lines for people or as JSON objects", choices=("text", "json")
    )
    prometheus_host: str = option("127.0.0.1", "address of a port of its own for metrics")
    prometheus_port: int = option(
        0, "that port, 0 for none; metrics are at /metrics of --port too", least=0, most=65535
    )
    otlp_traces_endpoint: str | None = option(
        None, "where OpenTelemetry spans of calls are sent; nowhere by default"
    )
    shutdown_timeout: float = option(
        60.0, "time calls in flight have to end after SIGTERM, seconds", least=0.0
    )
    max_payload_size: int = option(2**26, "largest request body, bytes", least=1)
    max_buffered_bytes: int = option(
        2**30, "bytes of request bodies in the router at once, more are refused", least=1
    )
    max_connections: int = option(
        0,
        "clients connected at once to a process, more get 503; 0 for as many as its limit of file "
        "descriptors allows",
        least=0,
    )
    replicas: str | None = option(
        None,
        "Redis or Valkey through which routers of the same engines tell each other what they do, "
        f"as redis://[user:password@]host:port/db or rediss:// (or ${KEY_VARIABLES['replicas']})",
    )
    replicas_fleet: str = option(
        "default", "name that those routers have in common; other fleets may use the same store"
    )
    replicas_stale_secs: float = option(
        2.0, "time after which what another router told of its calls is unknown", least=0.3
    )
    request_id_headers: tuple[str, ...] = option(
        ("x-request-id", "x-correlation-id", "x-trace-id", "request-id"),
        "headers that may bring a request id, first one first",
    )

    # Placement

    # Keys and TLS
    api_key: tuple[str, ...] = option(
        (), f"keys of which clients must present one (or ${KEY_VARIABLES['api_key']})"
    )
    api_keys: str | None = option(
        None, "YAML file of keys: whose each is, and the most that its clients can claim"
    )
    admin_api_key: tuple[str, ...] = option(
        (), f"keys for admin routes, closed without (or ${KEY_VARIABLES['admin_api_key']})"
    )
    engine_api_key: str | None = option(
        None,
        f"key presented to engines instead of the client's (or ${KEY_VARIABLES['engine_api_key']})",
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
    ssl_certfile: str | None = option(None, "serve HTTPS with this certificate chain, PEM")
    ssl_keyfile: str | None = option(None, "private key of --ssl-certfile, PEM")
    ssl_ca_certs: str | None = option(
        None, "clients must show a certificate that one of these has signed, PEM"
    )
    engine_ssl_ca_certs: str | None = option(
        None, "authorities that vouch for https engines, PEM; by default the system's"
    )
    allowed_hosts: tuple[str, ...] = option(
        (),
        "names that clients may call a router by (Host) that needs no key and listens on this "
        "machine only, with * and ?; addresses and local names always may",
    )
    allowed_origins: tuple[str, ...] = option(
        (),
        "web origins whose pages may call the router, * for all (CORS)",
        aliases=("cors_allowed_origins",),
    )
    allow_credentials: bool = option(False, "let those pages send credentials (CORS)")

    # Queue
    queue_size: int = option(
        4096,
        "calls that may wait for an engine, 0 for no limit",
        least=0,
        aliases=("max_held_calls",),
    )
    queue_timeout_secs: float = option(
        600.0,
        "longest wait for an engine, seconds, 0 for no limit",
        least=0.0,
        aliases=("held_timeout_s",),
    )
    max_concurrent_requests: int = option(
        0, "calls in the router at once, more are refused; 0 for no limit", least=0
    )

    # Overload

    # Retries
    retry_max_retries: int = option(3, "retries of a call before its first byte", least=0)
    disable_retries: bool = option(False, "never send a call twice")
    retry_initial_backoff_ms: float = option(50.0, "wait before the first retry, ms", least=0.0)
    retry_max_backoff_ms: float = option(5000.0, "longest wait before a retry, ms", least=0.0)
    retry_backoff_multiplier: float = option(1.5, "growth of the wait per retry", least=1.0)
    retry_jitter_factor: float = option(
        0.2, "share by which a wait varies at random", least=0.0, most=1.0
    )
    retry_budget_ratio: float = option(0.2, "retries allowed per call, on average", least=0.0)
    retry_budget_burst: float = option(
        100.0, "retries allowed at once after quiet times, and the most saved up", least=0.0
    )

    migration_limit: int = option(
        0,
        "times that another engine goes on with a stream whose engine fails, 0 for never; engines "
        "are then asked for token ids, which takes vLLM",
        least=0,
    )

    # Silence
    request_timeout_secs: float = option(
        1800.0, "longest wait for the first byte of an answer, seconds", least=1e-3
    )
    stream_stall_timeout_secs: float = option(
        300.0, "longest silence within an answer, seconds", least=1e-3
    )
    sse_keep_alive_interval: float = option(
        0.0,
        "longest silence of a stream before its client gets a comment, also while the call waits,"
        " seconds; 0 sends none",
        least=0.0,
    )
    engine_stall_secs: float = option(
        10.0,
        "least silence of an engine at work that makes it stalled, seconds, beside what its steps"
        " and prefills take; three times that while its health check passes; 0 never",
        least=0.0,
    )
    engine_stall_steps: float = option(
        50.0, "predicted steps of an engine at work that are added to that", least=0.0
    )
    engine_cold_secs: float = option(
        300.0,
        "longest silence of an engine that has done nothing since it started, or that nobody could"
        " stand in for while its health checks fail, seconds",
        least=0.0,
    )
    lost_stream_timeout_secs: float = option(
        30.0, "longest silence within an answer of an engine that is down, seconds", least=1e-3
    )

    # Health
    health_check_endpoint: str = option("/health", "path of an engine's health check")
    health_check_interval_secs: float = option(
        5.0, "time between health checks of an engine, seconds", least=1e-3
    )
    health_check_timeout_secs: float = option(
        5.0, "longest wait for a health check, seconds", least=1e-3
    )
    health_failure_threshold: int = option(
        3, "failed health checks until an engine is down", least=1
    )
    health_success_threshold: int = option(
        2, "passed health checks until an engine is up again", least=1
    )

    # Circuit breaker
    disable_circuit_breaker: bool = option(False, "take no engine out for calls that fail")
    cb_failure_threshold: int = option(5, "failed calls in a row that take an engine out", least=1)
    cb_error_ratio: float = option(
        0.5, "share of failed calls that takes an engine out, 1 for never", least=0.0, most=1.0
    )
    cb_least_calls: int = option(20, "calls in the window before the share counts", least=1)
    cb_window_duration_secs: float = option(
        60.0, "time over which the share of failed calls counts, seconds", least=1e-3
    )
    cb_timeout_duration_secs: float = option(
        10.0, "time until an engine that was taken out is tried, seconds", least=1e-3
    )
    cb_success_threshold: int = option(
        2, "calls that must succeed, one at a time, to bring it back", least=1
    )

    # Discovery
    worker_dns: tuple[str, ...] = option(
        (),
        "services whose addresses in DNS are engines: NAME:PORT for A and AAAA records, "
        "_PORTNAME._tcp.NAME for SRV records, which bring their ports",
    )
    worker_dns_records: str = option(
        "any",
        "address records that count; a or aaaa where engines have an address of each kind",
        choices=("any", "a", "aaaa"),
    )
    worker_dns_server: str | None = option(
        None, "DNS server to ask, as ADDRESS:PORT; by default those of /etc/resolv.conf"
    )
    worker_dns_refresh_secs: float = option(
        10.0, "longest time between look-ups of a service, seconds", least=0.05
    )
    worker_dns_least_refresh_secs: float = option(
        1.0, "shortest time between them, seconds; in between the records' TTL counts", least=0.05
    )
    worker_dns_timeout_secs: float = option(
        5.0, "longest wait for an answer from DNS, seconds", least=1e-2
    )
    service_discovery: bool = option(False, "take the pods in that --selector chooses")
    selector: tuple[str, ...] = option((), "labels of the engines' pods, as KEY=VALUE")
    service_discovery_port: int = option(
        8000, "port of pods without annotation hexgen-vllm/port", least=1, most=65535
    )
    service_discovery_namespace: str | None = option(
        None, "namespace of the pods; by default all of them"
    )
    kubeconfig: str | None = option(
        None, "file that says where the cluster is; by default the pod's own account, or kubectl's"
    )

    # Batches
    batch_dir: str | None = option(
        None, "folder of files and batches (/v1/files, /v1/batches); they are off by default"
    )
    batch_concurrency: int = option(
        0,
        "requests of batches in flight at once, 0 for nine tenths of what engines can run",
        least=0,
    )
    batch_max_file_bytes: int = option(200 * 2**20, "largest file that is taken, bytes", least=1)
    batch_max_requests: int = option(50_000, "requests of a batch, more are refused", least=1)
    batch_max_bytes: int = option(20 * 2**30, "bytes of all files and answers on disk", least=1)
    batch_max_tenant_bytes: int = option(10 * 2**30, "the same of one tenant", least=1)

    # Tuning
    tune: str = shared(OnlineOptions, "tune")
    tune_period_s: float = shared(OnlineOptions, "tune_period_s")
    tune_drift: float = shared(OnlineOptions, "tune_drift")
    tune_least_s: float = shared(OnlineOptions, "tune_least_s")
    tune_workflows: int = shared(OnlineOptions, "tune_workflows")
    tune_ring: int = shared(OnlineOptions, "tune_ring")
    tune_simulations: int = shared(OnlineOptions, "tune_simulations")

    def __post_init__(self) -> None:
        check(self)
        _check_access(self)
        _check_discovery(self)
        self.workers()

    @property
    def patience(self) -> Patience:
        """How long engines may be silent."""
        least_s, steps = self.engine_stall_secs, self.engine_stall_steps
        return Patience(least_s, steps, self.engine_cold_secs)

    @property
    def tuning(self) -> OnlineOptions:
        """How it is tuned."""
        return OnlineOptions(**{f.name: getattr(self, f.name) for f in fields(OnlineOptions)})

    @property
    def discovers(self) -> bool:
        """Whether engines are looked for at all."""
        return self.service_discovery or bool(self.worker_dns)

    def dns_services(self) -> tuple[DnsService, ...]:
        """Return the services to look up.

        Raises:
            ConfigError: one of them is none, or two are the same.
        """
        found = tuple(map(DnsService.parse, self.worker_dns))
        for one in found:
            if found.count(one) > 1:
                raise ConfigError(f"worker_dns must have different services, not two {one}.")
        return found

    def workers(self) -> tuple[Worker, ...]:
        """Return the engines; those without a name are ``engine-0``, ``engine-1``, ...

        Raises:
            ConfigError: a URL is not one, or two engines are the same.
        """
        found = tuple(parse_worker(t, f"engine-{i}") for i, t in enumerate(self.worker_urls))
        for field, values in (("names", [w.name for w in found]), ("URLs", [w.url for w in found])):
            for value in values:
                if values.count(value) > 1:
                    raise ConfigError(f"worker_urls must have different {field}, not two {value}.")
        return found

    def bounded(self, dispatch: DispatchOptions) -> DispatchOptions:
        """Return ``dispatch`` with the bounds of the queue that it leaves open."""
        return replace(
            dispatch,
            max_held_calls=dispatch.max_held_calls or self.queue_size,
            held_timeout_s=dispatch.held_timeout_s or self.queue_timeout_secs,
        )


def _option_name(name: str, where: str = "option") -> str:
    """Return the option of the router or of placement that ``name`` or an alias of it means.

    Raises:
        ConfigError: there is none; it is called an unknown ``where``.
    """
    meant = names_of(DispatchOptions) | names_of(RouterOptions)
    if name not in meant:
        known = [one for names in GROUPS.values() for one in names if one in meant]
        raise ConfigError(f"unknown {where} {name!r}; known are {known_names(name, known)}.")
    return meant[name]


def parted(values: Mapping[str, T], where: str = "option") -> tuple[dict[str, T], dict[str, T]]:
    """Return those of ``values`` that :class:`RouterOptions` has, and those of placement.

    Args:
        values: by the names of options or their aliases.
        where: what an unknown name is called.

    Raises:
        ConfigError: a name is unknown, or two mean the same option.
    """
    own = {f.name for f in fields(RouterOptions)}
    router = {name: value for name, value in values.items() if _option_name(name, where) in own}
    dispatch = {name: value for name, value in values.items() if name not in router}
    return with_current_names(RouterOptions, router), with_current_names(DispatchOptions, dispatch)


def composed(values: Mapping[str, Any]) -> tuple[RouterOptions, DispatchOptions]:
    """Return the options that ``values`` give by their names, the others at their defaults.

    Raises:
        ConfigError: a name is unknown, a value is wrong, or two do not go together.
    """
    router, dispatch = parted(values)
    placing = from_mapping(DispatchOptions, dispatch)
    return from_mapping(RouterOptions, router), placing


def _check_access(options: RouterOptions) -> None:
    check_patterns(options.worker_allowed_hosts)
    if any("/" in name or ":" in name or not name for name in options.allowed_hosts):
        raise ConfigError("allowed_hosts must be names without scheme, port and path.")
    if options.ssl_certfile is None and (options.ssl_keyfile or options.ssl_ca_certs):
        raise ConfigError("ssl_certfile must be given with ssl_keyfile and ssl_ca_certs.")
    if options.allow_credentials and "*" in options.allowed_origins:
        raise ConfigError("allowed_origins must name origins when allow_credentials is set.")
    if any(not key for key in (*options.api_key, *options.admin_api_key)):
        raise ConfigError("api_key and admin_api_key must not be empty.")
    if options.api_keys is not None:
        try:
            read_keys(Path(options.api_keys))
        except ConfigError as error:
            raise ConfigError(f"api_keys: {error}") from None
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "engine_ssl_ca_certs"):
        path = getattr(options, name)
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"{name} must be a file, and {path} is none.")


def _check_discovery(options: RouterOptions) -> None:
    options.dns_services()
    if options.worker_dns_server is not None:
        parse_server(options.worker_dns_server)
    if options.worker_dns_least_refresh_secs > options.worker_dns_refresh_secs:
        raise ConfigError("worker_dns_least_refresh_secs must be at most worker_dns_refresh_secs.")
    check_selector(options.selector)
    if options.service_discovery != bool(options.selector):
        raise ConfigError("service_discovery and selector must be given together.")
    _check_replicas(options)
    _check_installed("worker_dns", bool(options.worker_dns), "dns", "dns")
    _check_installed("service_discovery", options.service_discovery, "kubernetes_asyncio", "k8s")


def _check_replicas(options: RouterOptions) -> None:
    if re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", options.replicas_fleet) is None:
        raise ConfigError("replicas_fleet must be letters, digits, '.', '_' and '-', at most 64.")
    if options.replicas is None:
        return
    try:
        parts = urlsplit(options.replicas)
        usable = parts.port != 0 and bool(parts.path if parts.scheme == "unix" else parts.hostname)
    except ValueError:
        usable = False
    if not usable or parts.scheme not in ("redis", "rediss", "unix"):  # it may hold a password
        raise ConfigError("replicas must be like redis://host:6379/0, rediss:// or unix:///path.")
    _check_installed("replicas", True, "redis", "replicas")
    from redis.asyncio import Redis

    try:
        pool: Any = Redis.from_url(options.replicas).connection_pool
        pool.make_connection()
    except (TypeError, ValueError):
        text = "replicas has something in its path or after '?' that redis-py does not take."
        raise ConfigError(text) from None


def _check_installed(name: str, wanted: bool, module: str, extra: str) -> None:
    if wanted and find_spec(module) is None:
        raise ConfigError(f"{name} needs another package: pip install 'hexgen-vllm[{extra}]'.")


def parse_worker(text: str, default_name: str) -> Worker:
    """Return the engine that ``text`` names.

    Raises:
        ConfigError: it has no usable URL.
    """
    wrong = ConfigError(
        f"worker_urls must be like http://host:8000 or name=http://host:8000, not {text!r}."
    )
    match = _WORKER.fullmatch(text)
    if match is None:
        raise wrong
    url, _, more = match["url"].partition("?")
    worker = _said_of(Worker(match["name"] or default_name, url.rstrip("/")), more)
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and parts.port != 0 and not parts.fragment
        usable = usable and text.isprintable() and " " not in url
    except ValueError:
        raise wrong from None
    if not usable or worker is None:
        raise wrong
    _check_installed("kv_events", worker.kv_ports is not None, "zmq", "kv-events")
    return worker


def _said_of(worker: Worker, query: str) -> Worker | None:
    """Return an engine with what its URL says of it; ``None`` if anything is odd."""
    ports: dict[str, int] = {}
    words: str | None = None
    role: Role | None = None
    for item in query.split("&") if query else ():
        name, _, value = item.partition("=")
        is_port = re.fullmatch("[0-9]{1,5}", value) and 0 < int(value) < 2**16
        if name in _PORTS and name not in ports and is_port:
            ports[name] = int(value)
        elif name == "deadline" and words is None and value in TOLD:
            words = value
        elif name == "role" and role is None and value in _ROLES:
            role = Role(value)
        else:
            return None
    if "kv_replay" in ports and "kv_events" not in ports:
        return None
    events = ports.get("kv_events")
    kv_ports = None if events is None else (events, ports.get("kv_replay"))
    return worker._replace(
        stats_port=ports.get("stats_port"),
        deadline=words,
        kv_ports=kv_ports,
        role=role or Role.BOTH,
    )
