"""Options of finding engines. Names of ``--service-discovery`` and its kin are vllm-router's."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from hexgen_vllm.config import option
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.router.access_options import AccessOptions
from hexgen_vllm.router.discovery.names import DnsService, check_selector, parse_server


@dataclass(frozen=True)
class DiscoveryOptions(AccessOptions):
    """Where engines are looked for."""

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

    def check_access(self) -> None:
        """Check what must fit together.

        Raises:
            ConfigError: it does not.
        """
        super().check_access()
        self.dns_services()
        if self.worker_dns_server is not None:
            parse_server(self.worker_dns_server)
        if self.worker_dns_least_refresh_secs > self.worker_dns_refresh_secs:
            raise ConfigError(
                "worker_dns_least_refresh_secs must be at most worker_dns_refresh_secs."
            )
        check_selector(self.selector)
        if self.service_discovery != bool(self.selector):
            raise ConfigError("service_discovery and selector must be given together.")
        _check_installed("worker_dns", bool(self.worker_dns), "dns", "dns")
        _check_installed("service_discovery", self.service_discovery, "kubernetes_asyncio", "k8s")

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


def _check_installed(name: str, wanted: bool, module: str, extra: str) -> None:
    if wanted and find_spec(module) is None:
        raise ConfigError(f"{name} needs another package: pip install 'hexgen-vllm[{extra}]'.")
