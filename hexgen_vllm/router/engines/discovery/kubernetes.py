"""Keeps the engines among a cluster's pods: lists them, watches changes, lists again if need be."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any, Final

from hexgen_vllm.clock import Clock
from hexgen_vllm.router.discovery.book import EMPTY, OK, SourceBook
from hexgen_vllm.router.discovery.members import Members
from hexgen_vllm.router.discovery.options import DiscoveryOptions
from hexgen_vllm.router.discovery.pod_api import FORBIDDEN, GONE, ApiFailed, PodApi
from hexgen_vllm.router.discovery.pods import PORT, Pod, worker_of, wrong_port

_LOG = logging.getLogger(__name__)
_LEAST_PAUSE_S: Final = 0.2
_MOST_PAUSE_S: Final = 15.0


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
        options: DiscoveryOptions,
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
        found = (worker_of(pod, port, qualified=qualified) for pod in self._pods.values())
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
