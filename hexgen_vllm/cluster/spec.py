"""What a cluster is made of, as frozen values; :mod:`hexgen_vllm.cluster.file` reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from hexgen_vllm.cluster.ray_options import RayOptions, RayPlacement
from hexgen_vllm.config import DispatchOptions, EngineOptions
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.option import (
    RENAMED,
    check,
    from_mapping,
    is_http_url,
    option,
    with_current_names,
)
from hexgen_vllm.types import Role

ROLES: Final = tuple(role.value for role in Role)
SCHEDULERS: Final = ("hexgen", "fcfs", "priority")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_OF_VLLM: Final = ("model", "args", "scheduler", "hexgen")


@dataclass(frozen=True)
class EngineEntry:
    """One engine: a vLLM to start, any other server to start, or one that already runs.

    Attributes:
        env: environment variables on top of the supervisor's own.
        args: arguments of ``vllm serve``, as on its command line.
        hexgen: options of the ``hexgen`` scheduler (:class:`hexgen_vllm.config.EngineOptions`).
        command: starts a server that answers ``/health``; ``{host}`` and ``{port}`` are filled in.
        ray: where Ray puts it and how many of it
            (:class:`hexgen_vllm.cluster.ray_options.RayPlacement`).
    """

    name: str = option("", "unique name, also that of the log file")
    model: str = option("", "model of vLLM")
    device: str | None = option(None, "value of CUDA_VISIBLE_DEVICES")
    env: Mapping[str, str] = option({}, "environment variables")
    args: tuple[str, ...] = option((), "arguments of vllm serve")
    scheduler: str = option("hexgen", "what orders waiting calls", choices=SCHEDULERS)
    hexgen: Mapping[str, Any] = option({}, "options of the hexgen scheduler")
    role: str = option("both", "what part of a call it is there for", choices=ROLES)
    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(0, "port to listen on, 0 for a free one", least=0, most=65535)
    url: str | None = option(None, "a server that already runs; nothing is started")
    command: tuple[str, ...] = option((), "how to start a server that is not a vLLM")
    ray: Mapping[str, Any] = option({}, "where Ray puts it, and how many")

    def __post_init__(self) -> None:
        check(self)
        object.__setattr__(self, "hexgen", with_current_names(EngineOptions, self.hexgen))

    @property
    def placement(self) -> RayPlacement:
        """Where Ray puts it, and how many of it."""
        return from_mapping(RayPlacement, self.ray, where="ray key")

    def worker_url(self, url: str) -> str:
        """Return what the router is told of an engine of it that serves at ``url``."""
        return url if self.role == Role.BOTH.value else f"{url}?role={self.role}"

    def replicas(self) -> tuple[str, ...]:
        """Return the names of the engines that Ray may make of it: one has the entry's own."""
        most = self.placement.most
        return (self.name,) if most == 1 else tuple(f"{self.name}-{i}" for i in range(most))

    def check_whole(self) -> None:
        """Check what only all fields together can tell.

        Raises:
            ConfigError: the entry is incomplete or contradicts itself.
        """
        if not _NAME.fullmatch(self.name):
            raise ConfigError("name must be 1 to 64 letters, digits and _ . -.")
        if self.url is not None:
            self._check_url(self.url)
        elif self.command:
            self._must_be_without("command", _OF_VLLM)
        elif not self.model:
            raise ConfigError("model, url or command is missing.")
        if self.hexgen and self.scheduler != "hexgen":
            raise ConfigError(f"hexgen options do not go with scheduler {self.scheduler}.")
        from_mapping(EngineOptions, self.hexgen, where="hexgen option")
        self._check_placement()

    def _check_placement(self) -> None:
        placement = self.placement
        placement.check_whole()
        if self.port and placement.most > 1:
            raise ConfigError("port does not go with several replicas.")

    def _check_url(self, url: str) -> None:
        if not is_http_url(url):
            raise ConfigError(f"url must be like http://host:port, not {url!r}.")
        self._must_be_without("url", (*_OF_VLLM, "command", "port", "env", "device", "ray"))

    def _must_be_without(self, this: str, others: tuple[str, ...]) -> None:
        plain = EngineEntry()
        for other in others:
            if getattr(self, other) != getattr(plain, other):
                raise ConfigError(f"{other} does not go with {this}.")


@dataclass(frozen=True)
class RouterEntry:
    """The router in front of the engines.

    Attributes:
        options: its other options, named as :class:`hexgen_vllm.router.options.RouterOptions` and
            :class:`hexgen_vllm.config.DispatchOptions` name them.
    """

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(0, "port to listen on, 0 for a free one", least=0, most=65535)
    policy: str = option("slack", "how calls are placed", renamed=RENAMED)
    options: Mapping[str, Any] = option({}, "other options of the router")

    def __post_init__(self) -> None:
        check(self)
        from_mapping(DispatchOptions, {"policy": self.policy})
        options = dict(map(self._current, self.options.items()))
        object.__setattr__(self, "options", options)
        for name, value in options.items():
            self._check_option(name.replace("-", "_"), value)
        self._part({name.replace("-", "_"): value for name, value in self.options.items()})

    def _current(self, option: tuple[str, Any]) -> tuple[str, Any]:
        """Return an option by the name and the word that it has today."""
        name = option[0].replace("-", "_")
        router, dispatch = self._part({name: option[1]})
        ((now, value),) = {**router, **dispatch}.items()
        return option[0] if now == name else now, value

    def _check_option(self, name: str, value: Any) -> None:
        from hexgen_vllm.router.options import RouterOptions

        if name in ("worker_urls", "host", "port", "policy"):
            raise ConfigError(f"{name} does not belong among the router's other options.")
        router, dispatch = self._part({name: value})
        from_mapping(DispatchOptions, dispatch)
        from_mapping(RouterOptions, router)

    @staticmethod
    def _part(options: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        from hexgen_vllm.router.options import parted  # loads what routers need

        return parted(options, "router option")


@dataclass(frozen=True)
class ClusterSpec:
    """Engines, router and how they are kept.

    Attributes:
        router: ``None`` starts engines only.
        ray: what goes for all engines under Ray
            (:class:`hexgen_vllm.cluster.ray_options.RayOptions`).
    """

    engines: tuple[EngineEntry, ...] = option((), "the engines")
    router: RouterEntry | None = field(default_factory=RouterEntry)
    restart: bool = option(False, "start a process again when it dies")
    restart_after_s: float = option(1.0, "wait before the first restart, doubled by each", least=0)
    log_dir: str | None = option(None, "directory of the logs; a new temporary one when not set")
    start_timeout_s: float = option(600.0, "time an engine has to become healthy", least=1e-3)
    stop_grace_s: float = option(15.0, "time a process has to stop before it is killed", least=0.0)
    ray: Mapping[str, Any] = option({}, "what goes for all engines under Ray")

    @property
    def ray_options(self) -> RayOptions:
        """What goes for all engines under Ray."""
        return from_mapping(RayOptions, self.ray, where="ray key")

    def __post_init__(self) -> None:
        check(self)
        _ = self.ray_options
        if not self.engines:
            raise ConfigError("engines must name at least one engine.")
        names = [engine.name for engine in self.engines]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"engines must have different names, but two are {name!r}.")
        for engine in self.engines:
            engine.check_whole()
        self._check_replicas()

    def _check_replicas(self) -> None:
        replicas = [name for engine in self.engines for name in engine.replicas()]
        for name in replicas:
            if replicas.count(name) > 1:
                raise ConfigError(f"engines must have different names, but {name!r} is a replica.")
