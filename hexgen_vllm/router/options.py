"""Options of the router. Names follow vllm-router where the meaning is the same."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from hexgen_vllm.config import DispatchOptions, check, option
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.router.breaker import HealthOptions

_WORKER: Final = re.compile(r"(?:(?P<name>[A-Za-z0-9_.-]{1,64})=)?(?P<url>https?://.+)")


class Worker(NamedTuple):
    """An engine server: what clients may know it by, and where it is."""

    name: str
    url: str


@dataclass(frozen=True)
class RouterOptions(HealthOptions):
    """Options of the router and of its tuning; those of placement are ``DispatchOptions``."""

    worker_urls: tuple[str, ...] = option(
        (), "engines, as http://host:port or name=http://host:port"
    )
    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(30000, "port to listen on, 0 for a free one", least=0, most=65535)
    prometheus_host: str = option("127.0.0.1", "address of a port of its own for metrics")
    prometheus_port: int = option(
        0, "that port, 0 for none; metrics are at /metrics of --port too", least=0, most=65535
    )
    stock_scheduling: str = option(
        "auto",
        "how stock vLLM engines order calls, where they do not say",
        choices=("auto", "fcfs", "priority"),
    )
    request_timeout_secs: float = option(
        1800.0, "longest wait for the first byte of an answer, seconds", least=1e-3
    )
    sse_keep_alive_interval: float = option(
        0.0,
        "time between comments to clients whose streams have not begun, seconds; 0 sends none",
        least=0.0,
    )
    stream_stall_timeout_secs: float = option(
        300.0, "longest silence within an answer, seconds", least=1e-3
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
    health_check_endpoint: str = option("/health", "path of an engine's health check")
    stats_interval_secs: float = option(
        0.5, "time between readings of an engine's telemetry, seconds", least=1e-2
    )
    retry_max_retries: int = option(3, "retries of a call before its first byte", least=0)
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
    disable_retries: bool = option(False, "never send a call twice")
    max_concurrent_requests: int = option(
        0, "calls in the router at once, more are refused; 0 for no limit", least=0
    )
    queue_size: int = option(
        4096, "calls that may wait for an engine, 0 for no limit (also --max-held-calls)", least=0
    )
    queue_timeout_secs: float = option(
        600.0,
        "longest wait for an engine, seconds, 0 for no limit (also --held-timeout-s)",
        least=0.0,
    )
    router_workers: int = option(
        1, "processes that share the port; each workflow belongs to one of them", least=1, most=64
    )
    max_payload_size: int = option(2**26, "largest request body, bytes", least=1)
    max_connections: int = option(
        0,
        "clients connected at once to a process, more get 503; 0 for as many as its limit of file "
        "descriptors allows",
        least=0,
    )
    max_buffered_bytes: int = option(
        2**30, "bytes of request bodies in the router at once, more are refused", least=1
    )
    request_id_headers: tuple[str, ...] = option(
        ("x-request-id", "x-correlation-id", "x-trace-id", "request-id"),
        "headers that may bring a request id, first one first",
    )
    shutdown_timeout: float = option(
        60.0, "time calls in flight have to end after SIGTERM, seconds", least=0.0
    )
    log_level: str = option(
        "info", "least severe messages to log", choices=("debug", "info", "warning", "error")
    )
    log_format: str = option(
        "text", "log lines for people or as JSON objects", choices=("text", "json")
    )
    otlp_traces_endpoint: str | None = option(
        None, "where OpenTelemetry spans of calls are sent; nowhere by default"
    )

    def __post_init__(self) -> None:
        check(self)
        self.check_access()
        self.workers()

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


def parse_worker(text: str, default_name: str) -> Worker:
    """Return the engine that ``text`` names.

    Raises:
        ConfigError: it has no usable URL.
    """
    match = _WORKER.fullmatch(text)
    wrong = ConfigError(
        f"worker_urls must be like http://host:8000 or name=http://host:8000, not {text!r}."
    )
    if match is None:
        raise wrong
    url = match["url"].rstrip("/")
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and parts.port != 0 and not (parts.query or parts.fragment)
        usable = usable and text.isprintable() and " " not in url
    except ValueError:
        raise wrong from None
    if not usable:
        raise wrong
    return Worker(match["name"] or default_name, url)
