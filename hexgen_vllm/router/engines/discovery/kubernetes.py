"""Engines by Kubernetes: pods that match a selector, are ready, and do not end.

The API server is asked for a list of the pods, then for changes of it, and for a new list when it
has forgotten where it was.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiohttp
import yaml
from kubernetes_asyncio import client, config
from kubernetes_asyncio.client.exceptions import ApiException

from hexgen_vllm.clock import Clock
from hexgen_vllm.errors import ConfigError, HexgenError
from hexgen_vllm.router.addresses import Address, short_name
from hexgen_vllm.router.engines.discovery.members import (
    EMPTY,
    OK,
    Members,
    SourceBook,
)
from hexgen_vllm.router.options import RouterOptions, Worker
from hexgen_vllm.types import Role
from hexgen_vllm.wire import from_json

GONE: Final = "gone"
FORBIDDEN: Final = "forbidden"
# What a file of another shape makes the client stumble over.
_MALFORMED: Final = (AttributeError, KeyError, TypeError, ValueError)
_LIST_S: Final = 30.0
_PAGE: Final = 500
PORT: Final = "hexgen-vllm/port"
"""Annotation of a pod whose engine listens on another port than the rest."""
STATS_PORT: Final = "hexgen-vllm/stats-port"
"""Annotation of a pod whose engine process gives its telemetry itself, at no usual port."""
ROLE: Final = "hexgen-vllm/role"
"""Annotation of a pod whose engine is for prefill or decode only; else llm-d's label says so."""
_LLM_D_ROLE: Final = "llm-d.ai/role"
_LOG = logging.getLogger(__name__)
_LEAST_PAUSE_S: Final = 0.2
_MOST_PAUSE_S: Final = 15.0
_REASONS: Final = {401: "unauthorized", 403: FORBIDDEN, 410: GONE}


class ApiFailed(HexgenError):  # noqa: N818 - an outcome, not a defect
    """The API server gave no answer; ``reason`` is one word."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the API server gave no answer ({reason})")
        self.reason = reason


class Listing(NamedTuple):
    """Pods, and since when changes of them are to be watched."""

    pods: tuple[dict[str, Any], ...]
    version: str


class PodApi:
    """The pods that the options choose.

    Args:
        options: which pods, and where the cluster is.
        watch_s: how long one watch lasts, seconds.
    """

    def __init__(self, options: RouterOptions, watch_s: float) -> None:
        self._options, self._watch_s = options, watch_s
        self._client: client.ApiClient | None = None

    async def open(self) -> None:
        """Find out where the cluster is, and who we are there.

        Raises:
            ConfigError: that is not known.
        """
        settings = client.Configuration()
        path = self._options.kubeconfig
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"kubeconfig must be a file, and {path} is none.")
        try:
            if path is None and "KUBERNETES_SERVICE_HOST" in os.environ:
                config.load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]
            else:
                await config.load_kube_config(config_file=path, client_configuration=settings)
        except (config.ConfigException, yaml.YAMLError, OSError, *_MALFORMED) as error:
            raise _no_cluster(path, error) from None
        settings.retries = None  # who asks tries again himself
        self._client = client.ApiClient(configuration=settings)

    async def close(self) -> None:
        """Close all connections."""
        if self._client is not None:
            await self._client.close()

    async def list(self) -> Listing:
        """Return all pods.

        Raises:
            ApiFailed: nobody says.
        """
        pods: list[dict[str, Any]] = []
        version, more = "", ""
        while True:
            said = await self._page(more)
            items, meta = said.get("items"), said.get("metadata")
            if not isinstance(items, list) or not isinstance(meta, dict):
                raise ApiFailed("error")
            pods.extend(item for item in items if isinstance(item, dict))
            version, more = str(meta.get("resourceVersion", "")), str(meta.get("continue") or "")
            if not more:
                return Listing(tuple(pods), version)

    async def watch(self, version: str) -> AsyncIterator[dict[str, Any]]:
        """Yield changes since ``version`` until the server ends the watch.

        Raises:
            ApiFailed: the version is too old (``gone``), or the connection broke.
        """
        seconds = max(int(self._watch_s), 1)
        answer = await self._ask(
            seconds + _LIST_S,
            watch=True,
            resource_version=version,
            allow_watch_bookmarks=True,
            timeout_seconds=seconds,
        )
        try:
            async for line in _lines(answer):
                yield _event(line)
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
            raise ApiFailed("unreachable") from None
        finally:
            answer.close()

    async def _page(self, more: str) -> dict[str, Any]:
        start = {"_continue": more} if more else {}
        answer = await self._ask(_LIST_S, limit=_PAGE, **start)
        try:
            return _object(await answer.read())
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
            raise ApiFailed("unreachable") from None
        finally:
            answer.release()

    async def _ask(self, seconds: float, **parameters: Any) -> aiohttp.ClientResponse:
        core: Any = client.CoreV1Api(self._client)  # its types know no answer that is not read
        space = self._options.service_discovery_namespace
        ask = core.list_pod_for_all_namespaces if space is None else core.list_namespaced_pod
        where: Sequence[str] = () if space is None else (space,)
        try:
            answer: aiohttp.ClientResponse = await ask(
                *where,
                label_selector=",".join(self._options.selector),
                _preload_content=False,
                _request_timeout=seconds,
                **parameters,
            )
        except ApiException as error:
            raise ApiFailed(_reason(error.status)) from None
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
            raise ApiFailed("unreachable") from None
        if answer.status != 200:
            answer.release()
            raise ApiFailed(_reason(answer.status))
        return answer


async def _lines(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Yield the lines of a body; a pod may be longer than what ``readline`` takes."""
    rest = b""
    async for piece in answer.content.iter_any():
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            if line.strip():
                yield line


def _event(line: bytes) -> dict[str, Any]:
    found = _object(line)
    thing = found.get("object")
    if not isinstance(thing, dict):
        raise ApiFailed("error")
    if found.get("type") == "ERROR":
        raise ApiFailed(_reason(thing.get("code")))
    return found


def _object(text: bytes) -> dict[str, Any]:
    try:
        found = from_json(text)
    except ValueError:
        raise ApiFailed("error") from None
    if not isinstance(found, dict):
        raise ApiFailed("error")
    return found


def _reason(status: object) -> str:
    return _REASONS.get(status, "error") if isinstance(status, int) else "error"


def _no_cluster(path: str | None, error: Exception) -> ConfigError:
    """Return the error of a cluster that cannot be found."""
    said = "it does not have the form of one" if isinstance(error, _MALFORMED) else _first(error)
    if path is not None:
        return ConfigError(f"kubeconfig {path} cannot be used: {said}.")
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return ConfigError(f"service_discovery cannot use the account of this pod: {said}.")
    return ConfigError(
        "service_discovery finds no cluster: there is no account of a pod and no kubeconfig."
    )


def _first(error: Exception) -> str:
    """Return the first line of what an error says."""
    return (str(error).strip().splitlines() or ["no reason is given"])[0].rstrip(".")[:200]


Pod = Mapping[str, Any]


def worker_in_pod(pod: Pod, default_port: int, *, qualified: bool) -> Worker | None:
    """Return the engine in a pod, ``None`` while it is not to get calls.

    Args:
        pod: as the API server describes it.
        default_port: where engines listen.
        qualified: whether names of pods need that of their namespace.
    """
    meta, status = _part(pod, "metadata"), _part(pod, "status")
    host, port = status.get("podIP"), _port(meta, default_port)
    if not isinstance(host, str) or not host or port is None:
        return None
    if meta.get("deletionTimestamp") is not None or not _ready(status):
        return None
    name = str(meta.get("name", ""))
    full = f"{meta.get('namespace', '')}.{name}" if qualified else name
    stats_port = _port(meta, None, STATS_PORT)
    if not name:
        return None
    return Worker(short_name(full), Address(host, port).url, stats_port, role=_role(meta))


def _role(meta: Pod) -> Role:
    said = _part(meta, "annotations").get(ROLE) or _part(meta, "labels").get(_LLM_D_ROLE)
    return next((role for role in Role if role.value == said), Role.BOTH)


def wrong_port(pod: Pod) -> bool:
    """Whether the annotation of a pod names no port."""
    return _port(_part(pod, "metadata"), 1) is None


def _port(meta: Pod, default: int | None, annotation: str = PORT) -> int | None:
    said = _part(meta, "annotations").get(annotation)
    if said is None:
        return default
    usable = isinstance(said, str) and said.isascii() and said.isdigit() and len(said) <= 5
    return int(said) if usable and 0 < int(said) < 65536 else None


def _ready(status: Pod) -> bool:
    conditions = status.get("conditions")
    for one in conditions if isinstance(conditions, list) else ():
        if isinstance(one, Mapping) and one.get("type") == "Ready":
            return bool(one.get("status") == "True")
    return False


def _part(of: Pod, key: str) -> Pod:
    found = of.get(key)
    return found if isinstance(found, Mapping) else {}


class PodSource:
    """Follows the pods; :meth:`run` is its task.

    Args:
        api: says which pods there are.
        members: get the engines among them.
        book: counts what was asked.
        options: which pods.
        clock: time of the book.
    """

    def __init__(
        self,
        api: PodApi,
        members: Members,
        book: SourceBook,
        options: RouterOptions,
        clock: Clock,
    ) -> None:
        self._api, self._members, self._book = api, members, book
        self._options, self._clock = options, clock
        self._pods: dict[tuple[str, str], Pod] = {}
        self._version = ""
        self._pause_s = _LEAST_PAUSE_S

    async def run(self) -> None:
        """Follow the pods until cancelled; what is not answered is asked again, ever less often."""
        while True:
            try:
                await self.turn()
            except ApiFailed as why:
                self._failed(why.reason)
            except Exception:  # whatever it was, the pods must not go unwatched
                _LOG.exception("watching pods failed")
                self._version = ""
            else:
                self._pause_s = _LEAST_PAUSE_S
            await asyncio.sleep(self._pause_s * random.uniform(0.5, 1.0))
            self._pause_s = min(2 * self._pause_s, _MOST_PAUSE_S)

    async def turn(self) -> None:
        """List the pods unless they are known, and watch them until the server ends the watch.

        Raises:
            ApiFailed: one of that failed.
        """
        if not self._version:
            listing = await self._api.list()
            self._pods = {_key(pod): pod for pod in listing.pods}
            self._version = listing.version
            self._changed()
            self._asked()
        async for event in self._api.watch(self._version):
            self._take(event)
        self._asked()

    def _take(self, event: dict[str, Any]) -> None:
        pod, what = event["object"], event.get("type")
        meta = pod.get("metadata")
        version = meta.get("resourceVersion") if isinstance(meta, dict) else None
        self._version = str(version) if version else self._version
        if what == "DELETED":
            self._pods.pop(_key(pod), None)
        elif what in ("ADDED", "MODIFIED"):
            self._pods[_key(pod)] = pod
            if wrong_port(pod):
                _LOG.warning("pod left out, annotation %s is no port pod=%s", PORT, _key(pod)[1])
        else:
            return  # a bookmark: only the version moves on
        self._pause_s = _LEAST_PAUSE_S
        self._changed()
        self._asked()

    def _changed(self) -> None:
        port = self._options.service_discovery_port
        qualified = self._options.service_discovery_namespace is None
        found = (worker_in_pod(pod, port, qualified=qualified) for pod in self._pods.values())
        self._members.want(worker for worker in found if worker is not None)

    def _asked(self) -> None:
        outcome = OK if self._book.wanted else EMPTY
        if not self._book.asked(outcome, self._clock.now()):
            return
        pods, selector = len(self._pods), ",".join(self._options.selector)
        if outcome == EMPTY:
            _LOG.warning("no pod is ready selector=%s pods=%d", selector, pods)
        else:
            _LOG.info("pods are ready selector=%s pods=%d", selector, pods)

    def _failed(self, reason: str) -> None:
        if reason in (GONE, FORBIDDEN):
            self._version = ""
        if not self._book.asked(reason, self._clock.now()):
            return
        if reason == FORBIDDEN:
            space = self._options.service_discovery_namespace
            where = "all namespaces" if space is None else f"namespace {space}"
            _LOG.error(
                "the API server does not let this account list and watch pods in %s; "
                "see the role in examples/kubernetes",
                where,
            )
        elif reason != GONE:
            _LOG.warning("API server gives no answer reason=%s kept=%d", reason, self._book.wanted)


def _key(pod: Pod) -> tuple[str, str]:
    meta = pod.get("metadata")
    meta = meta if isinstance(meta, dict) else {}
    return str(meta.get("namespace", "")), str(meta.get("name", ""))
