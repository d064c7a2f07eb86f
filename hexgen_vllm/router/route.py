"""One route: what the router serves at a path, to whom, and which of its processes answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final, Generic, TypeVar

from aiohttp import web

from hexgen_vllm.router.endpoints import Endpoint
from hexgen_vllm.router.http.request import Request

PAGE_PATH: Final = "/ui"
DATA_PATH: Final = "/ui/data"
LOAD_PATH: Final = "/shard/load"
RESPONSE_PATH: Final = "/shard/response"
Handler = Callable[[Request], Awaitable[web.StreamResponse]]
PartsT = TypeVar("PartsT")


class Access(Enum):
    """Who may use a route."""

    OPEN = "open"  # everybody: load balancers and scrapers have no key
    CLIENT = "client"  # who shows a client key or an admin key, if client keys are set
    ADMIN = "admin"  # who shows an admin key
    PROCESS = "process"  # other processes of this router; for all others it does not exist


class ProcessScope(Enum):
    """Which of several router processes answers."""

    HERE = "here"  # the one that was asked
    OWNER = "owner"  # the one that has the workflow
    ALL = "all"  # what is shown is of all together; what is changed is changed in all


class Topic(Enum):
    """What a route is about; the tags of the OpenAPI document."""

    MONITORING = "monitoring"  # also served on the port for metrics
    STATUS = "status"
    CALLS = "calls"
    BATCHES = "batches"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Route(Generic[PartsT]):
    """One route.

    Attributes:
        method: of requests; ``GET`` stands for ``HEAD`` too.
        path: ``{name}`` stands for one segment, which the handler finds in ``request.params``.
        bind: returns what answers requests, of one router's parts.
        access: who may ask.
        scope: which process answers.
        topic: what it is about.
        summary: one sentence for people.
        content: type of a good answer, ``None`` if it has no body.
        query: parameters in the query; one that ends with ``*`` must be there.
        statuses: of good answers.
        shows_tenants: it shows what all tenants do; where keys are of several, it is for admins.
        endpoint: what a body means, for calls.
    """

    method: str
    path: str
    bind: Callable[[PartsT], Handler]
    access: Access
    scope: ProcessScope
    topic: Topic
    summary: str
    content: str | None = "application/json"
    query: tuple[str, ...] = ()
    statuses: tuple[int, ...] = (200,)
    shows_tenants: bool = False
    endpoint: Endpoint | None = None

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods it answers."""
        return ("GET", "HEAD") if self.method == "GET" else (self.method,)
