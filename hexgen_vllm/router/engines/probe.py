"""Asks an engine server what it is and how it is; every answer may be missing or late."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

from yarl import URL

from hexgen_vllm.errors import HexgenError
from hexgen_vllm.router.engines import telemetry as reports
from hexgen_vllm.router.engines.ranks import targets_of
from hexgen_vllm.router.engines.telemetry import Telemetry
from hexgen_vllm.router.http.client import Pool
from hexgen_vllm.router.http.errors import CannotConnect, ConnectTimeout, NoSuchHost, is_short
from hexgen_vllm.router.options import RouterOptions, Worker
from hexgen_vllm.types import EngineKind, EngineReport, EngineSpec
from hexgen_vllm.wire import POLLER, STATS_PATH, json_object, stats_port

_RUST_VERSION: Final = "rust_frontend_version"
_SHORT: Final = "the router has nothing left to connect with"
MAX_ANSWER_BYTES: Final = 16 * 2**20
_UNKNOWN: Final = Telemetry(EngineReport())
_STOCK: Final = {"fcfs": EngineKind.FCFS, "priority": EngineKind.PRIORITY}


class Unreachable(HexgenError):  # noqa: N818 - an answer, not a defect
    """The engine cannot be asked now.

    Attributes:
        refused: nobody listens there.
        short: there is nothing left here to connect with, which says nothing of the engine.
        silent: it did not answer in time, and may only be busy.
    """

    def __init__(
        self, message: str, *, refused: bool = False, short: bool = False, silent: bool = False
    ) -> None:
        super().__init__(message)
        self.refused, self.short, self.silent = refused, short, silent


class Front(NamedTuple):
    """What of an engine's server is not as it is with vLLM's Python server.

    Attributes:
        bare: it is vLLM's Rust server: it has no place for our middleware, so that no headers of
            ours reach the engine, and its priorities are of 32 bits.
        stats: URLs of our telemetry, by rank, where the server has none.
    """

    bare: bool = False
    stats: tuple[str, ...] = ()

    @property
    def mute(self) -> bool:
        """Whether the engine might be ours, and nothing was heard from it."""
        return self.bare and not self.stats


_PLAIN: Final = Front()


class Found(NamedTuple):
    """What a probe found out.

    Attributes:
        specs: for the coordinator, one for each rank that is placed on by itself.
        cards: its entries of ``/v1/models``.
        certain: whether the engine itself said how it orders calls.
        front: what kind of server it has.
    """

    specs: tuple[EngineSpec, ...]
    cards: tuple[dict[str, Any], ...]
    certain: bool
    front: Front = _PLAIN

    @property
    def spec(self) -> EngineSpec:
        """What is so for all ranks, but for the name."""
        return self.specs[0]


class Probe:
    """Asks engines over the connections of ``pool``."""

    def __init__(self, pool: Pool, options: RouterOptions) -> None:
        self._pool, self._options = pool, options
        key = options.engine_api_key
        self._headers = {"User-Agent": POLLER}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"

    async def healthy(self, worker: Worker) -> None:
        """Check the health of an engine.

        Raises:
            Unreachable: it does not.
        """
        status, _ = await self._get(worker, self._options.health_check_endpoint)
        if status != 200:
            raise Unreachable(f"its health check answers {status}")

    async def find(self, worker: Worker) -> Found:
        """Find out what the engine is.

        Raises:
            Unreachable: it does not answer, or does not list its models yet.
        """
        cards = await self.models(worker)
        status, body = await self._get(worker, STATS_PATH)
        if status in (200, 503):  # 503: it is ours, and too busy to say more
            readings = reports.from_stats(json_object(body)) if status == 200 else ()
            return self._found(worker, cards, EngineKind.HEXGEN, readings)
        front, beside = await self._behind(worker)
        if front.stats:
            return self._found(worker, cards, EngineKind.HEXGEN, beside)._replace(front=front)
        return (await self._stock(worker, cards))._replace(front=front)

    async def _behind(self, worker: Worker) -> tuple[Front, Sequence[Telemetry]]:
        """Return what server an engine has, and our telemetry if its process gives it itself."""
        status, body = await self._get(worker, "/version")
        bare = status == 200 and _RUST_VERSION in json_object(body)
        there = URL(worker.url)
        port = stats_port(there.port or 0) if bare else None
        port = worker.stats_port or port
        if port is None:
            return Front(bare), ()
        at = there.with_scheme("http").with_path(STATS_PATH)
        (first,) = await self._beside(worker, [str(at.with_port(port))])
        if not first:
            return Front(bare), ()
        ports = range(port, min(port + reports.size(first), 2**16))
        front = Front(True, tuple(str(at.with_port(one)) for one in ports))
        return front, await self._read_beside(worker, front.stats)

    async def _read_beside(self, worker: Worker, urls: Sequence[str]) -> Sequence[Telemetry]:
        found = await self._beside(worker, urls)
        return self._told_apart(reports.from_stats({"ranks": found})) if any(found) else ()

    async def _beside(self, worker: Worker, urls: Sequence[str]) -> list[dict[str, Any]]:
        """Return what engine processes say there; nothing of those that say nothing of ours.

        Who listens on a port that nobody named is not shown our key.
        """
        named = worker.stats_port is not None
        headers = self._headers if named else {"User-Agent": POLLER}
        asked = (self._ask(URL(url), headers) for url in urls)
        found = await asyncio.gather(*asked, return_exceptions=True)
        said = [json_object(one[1]) if not isinstance(one, BaseException) else {} for one in found]
        return [one if reports.is_ours(one) else {} for one in said]

    async def _stock(self, worker: Worker, cards: tuple[dict[str, Any], ...]) -> Found:
        status, body = await self._get(worker, "/server_info?config_format=json")
        info = json_object(body) if status == 200 else {}
        policy, slots = reports.scheduling(info)
        assumed = self._options.stock_scheduling
        words = worker.deadline or policy or assumed
        kind = _STOCK.get(words, EngineKind.FCFS)
        status, body = await self._get(worker, "/metrics")
        readings = reports.from_metrics(_text(body)) if status == 200 else ()
        budget = reports.token_budget(info)
        limited = [
            replace(one, max_num_seqs=slots, max_num_batched_tokens=budget)
            for one in readings or (_UNKNOWN,) * self._ranks
        ]
        certain = policy is not None or words != "auto"
        return self._found(worker, cards, kind, limited)._replace(certain=certain)

    def _found(
        self,
        worker: Worker,
        cards: tuple[dict[str, Any], ...],
        kind: EngineKind,
        readings: Sequence[Telemetry],
    ) -> Found:
        models, most = names(cards), longest(cards)
        by_rank = self._told_apart(readings)
        specs = (
            EngineSpec(target, models, kind, one.max_num_seqs, one.kv_tokens,
                       one.max_num_batched_tokens, most, role=worker.role)
            for target, one in zip(targets_of(worker.name, len(by_rank)), by_rank, strict=True)
        )  # fmt: skip
        return Found(tuple(specs), cards, True)

    @property
    def _ranks(self) -> int:
        return max(self._options.intra_node_data_parallel_size, 1)

    def _told_apart(self, readings: Sequence[Telemetry]) -> Sequence[Telemetry]:
        """Return one reading for each rank that is placed on by itself."""
        if not readings:
            return (_UNKNOWN,) * self._ranks
        if self._options.intra_node_data_parallel_size == 1:
            return (reports.together(readings),)
        return readings

    async def models(self, worker: Worker) -> tuple[dict[str, Any], ...]:
        """Return the engine's model cards.

        Raises:
            Unreachable: it does not say.
        """
        status, body = await self._get(worker, "/v1/models")
        data = json_object(body).get("data") if status == 200 else None
        if not isinstance(data, list):
            raise Unreachable(f"its list of models answers {status}")
        return tuple(c for c in data if isinstance(c, dict) and isinstance(c.get("id"), str))

    async def telemetry(
        self, worker: Worker, kind: EngineKind, front: Front = _PLAIN
    ) -> Sequence[Telemetry]:
        """Return a reading for each rank, nothing when the engine has none to give.

        Raises:
            Unreachable: it does not answer.
        """
        if front.stats:
            return await self._read_beside(worker, front.stats)
        ours = kind is EngineKind.HEXGEN
        status, body = await self._get(worker, STATS_PATH if ours else "/metrics")
        if status != 200:
            return ()
        readings = (
            reports.from_stats(json_object(body)) if ours else reports.from_metrics(_text(body))
        )
        return self._told_apart(readings) if readings else ()

    async def _get(self, worker: Worker, path: str) -> tuple[int, bytes]:
        return await self._ask(URL(worker.url + path, encoded=True), self._headers)

    async def _ask(self, url: URL, headers: Mapping[str, str]) -> tuple[int, bytes]:
        options = self._options
        try:
            return await self._pool.get(
                url,
                headers,
                most=MAX_ANSWER_BYTES,
                within_s=options.health_check_timeout_secs,
            )
        except (asyncio.TimeoutError, ConnectTimeout):
            raise Unreachable("it does not answer in time", silent=True) from None
        except (OSError, MemoryError) as error:
            if is_short(error):
                raise Unreachable(_SHORT, short=True) from None
            if isinstance(error, NoSuchHost):
                text = f"the name of its host, {url.host}, is not known"
                raise Unreachable(text, refused=True) from None
            if isinstance(error, CannotConnect):
                raise Unreachable("nobody listens there", refused=True) from None
            raise Unreachable(f"it does not answer ({type(error).__name__})") from None


def names(cards: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """Return the names of the models on these cards."""
    return frozenset(str(card["id"]) for card in cards)


def longest(cards: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the longest call that an engine with these model cards takes, if it says so.

    Adapters have the length of their parent and say none.
    """
    found = [card.get("max_model_len") for card in cards if not card.get("parent")]
    known = [length for length in found if type(length) is int and length > 0]
    return max(known) if known and len(known) == len(found) else None


def _text(body: bytes) -> str:
    return body.decode("utf-8", "replace")
