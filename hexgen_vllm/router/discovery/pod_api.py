"""Lists and watches pods through the API server of a cluster."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiohttp
import yaml
from kubernetes_asyncio import client, config
from kubernetes_asyncio.client.exceptions import ApiException

from hexgen_vllm.errors import ConfigError, HexgenError
from hexgen_vllm.router.discovery.options import DiscoveryOptions

GONE: Final = "gone"
FORBIDDEN: Final = "forbidden"
_REASONS: Final = {401: "unauthorized", 403: FORBIDDEN, 410: GONE}
# What a file of another shape makes the client stumble over.
_MALFORMED: Final = (AttributeError, KeyError, TypeError, ValueError)
_LIST_S: Final = 30.0
_PAGE: Final = 500


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

    def __init__(self, options: DiscoveryOptions, watch_s: float) -> None:
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
        found = json.loads(text)
    except (ValueError, RecursionError):
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
