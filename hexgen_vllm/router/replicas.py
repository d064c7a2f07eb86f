"""Routers in front of the same engines tell each other what they do, through Redis or Valkey.

    coordinator ──► changes ──► one message each 25 ms at most ──► PUBLISH ──► all others
                                and the workflows in it ─────────► keys with a TTL, for who
                                                                   comes later

What is told: the calls that a router has on each engine, its open workflows (deadline, calls so
far, the engine that has the last prompt), workflows that ended (all learn from them), and what its
traffic taught of the speed of engines. Everything that is told is read into memory; no call waits
for the store, and none fails with it.

Loads of a router that has not been heard of for a while are unknown, not zero: they no longer
count, and what engines say of themselves remains. After the store was away, everything open is
told anew, what ended meanwhile is told as far as it is kept, and keys are read again. Times travel
as times of the store, whose clock each router compares with its own; theirs need not agree.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import astuple
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import msgspec
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from hexgen_vllm.policy.engine_load import Elsewhere
from hexgen_vllm.policy.exchange import WorkflowPart
from hexgen_vllm.policy.workflow import SeenCall
from hexgen_vllm.router.observe.families import counter, gauge
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.router.service import Service
from hexgen_vllm.tasks import together
from hexgen_vllm.types import StepCost

INTERVAL_S: Final = 0.025
"""Time between messages while there is something to tell."""
_BEAT_S: Final = 0.25  # and while there is nothing
_TIMEOUT_S: Final = 1.0
_RETRY_S: Final = (0.1, 2.0)
_BATCH: Final = 500  # workflows of a message
_KEPT_S: Final = 660  # a workflow that is silent for so long has ended everywhere
_LEARNED_S: Final = 10  # time between two writings of what was learned
_LEARNED_KEPT_S: Final = 7 * 24 * 3600
_COMPARISONS: Final = 3  # the quickest answer is the truest
_CLOCKS_S: Final = 5.0  # time between two comparisons of clocks
_FORMAT: Final = 1
_ID_BYTES: Final = 8
_LOG = logging.getLogger(__name__)


class _Call(msgspec.Struct, array_like=True, gc=False):
    name: str
    stage: str
    ordinal: int
    arrived_s: float
    prompt_tokens: int
    ended_s: float | None
    uncached_tokens: int
    output_tokens: int


class _Workflow(msgspec.Struct, array_like=True, gc=False):
    id: str
    type: str
    learned_as: str
    started_s: float
    last_seen_s: float
    turn: int
    asked: bool
    asked_s: float
    deadline_s: float
    ordered_by_s: float
    background: bool
    engine: str
    prefix: tuple[int, ...]
    chunk_tokens: int
    over: bool
    calls: list[_Call]
    gone: list[str]


_Cost = tuple[float, float, float, float, float, float]


class _Message(msgspec.Struct, array_like=True):
    """Fields may be added at the end, with defaults: routers of two versions run side by side."""

    format: int
    group: str
    at_s: float
    leaving: bool
    loads: dict[str, Elsewhere]
    rates: dict[str, tuple[_Cost, float | None]]
    workflows: list[_Workflow]


class _Learned(msgspec.Struct, array_like=True):
    format: int
    shapes: list[Any]
    rates: dict[str, tuple[_Cost, float | None]]


_ENCODE: Final = msgspec.msgpack.Encoder().encode
_MESSAGE: Final = msgspec.msgpack.Decoder(_Message)
_WORKFLOW: Final = msgspec.msgpack.Decoder(_Workflow)
_CALL: Final = msgspec.msgpack.Decoder(_Call)
_LEARNED: Final = msgspec.msgpack.Decoder(_Learned)


class _Other(NamedTuple):
    """Another router, as it was last heard."""

    group: str
    at_s: float  # on the own clock
    loads: dict[str, Elsewhere]


def shown(url: str) -> str:
    """Return the address of a store without what must not be logged."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


class Replicas:
    """Exchanges with other routers what they must know of each other.

    Args:
        options: ``replicas`` says where the store is.
        service: whose coordinator is told, and tells.
        group: common to processes of one router, which tell each other their loads themselves.

    Attributes:
        problem: why the store cannot be used now; ``None`` while it can.
        sent, received, unreadable: messages.
    """

    def __init__(self, options: RouterOptions, service: Service, group: str = "") -> None:
        assert options.replicas is not None
        self._url, self._stale_s = options.replicas, options.replicas_stale_secs
        self._service, self._workflows = service, service.coordinator.workflows
        self._clock = service.clock
        self._id = secrets.token_hex(_ID_BYTES // 2)
        self._mark = self._id.encode()
        self._group = group or self._id
        self._prefix = f"hexgen:{options.replicas_fleet}:"
        self._channel = self._prefix + "live"
        self._offset_s = 0.0  # from the own clock to the store's
        self._others: dict[str, _Other] = {}
        self._heard = False  # since loads were added up
        self._rates: dict[str, tuple[_Cost, float | None]] = {}  # of engines yet to join
        self._unsent: list[WorkflowPart] = []
        self._restored = False
        self._echo_s = -math.inf
        self.lag_s = 0.0
        self.problem: str | None = "not connected yet"
        self.sent = self.received = self.unreadable = 0
        self._workflows.share()

    def view(self) -> dict[str, Any]:
        """Return how it stands, as JSON can say it."""
        age_s = None if math.isinf(self.age_s) else round(self.age_s, 3)
        return {
            "others": self.others,
            "store": self.problem is None,
            "age_s": age_s,
            "lag_s": None if age_s is None else round(self.lag_s, 4),
        }

    @property
    def others(self) -> int:
        """Other routers, or processes of them, that were heard of lately."""
        return len(self._others)

    @property
    def age_s(self) -> float:
        """Seconds since a message was seen to go through the store; ``inf`` before the first."""
        return self._clock.now() - self._echo_s

    async def run(self) -> None:
        """Tell and hear, for ever."""
        await asyncio.gather(self._beat(), self._exchange())

    async def close(self) -> None:
        """Tell what is left, and that this router is no more."""
        if self.problem is not None:
            return
        store = self._open()
        try:
            await asyncio.wait_for(self._tell(store, leaving=True), _TIMEOUT_S)
        except (OSError, asyncio.TimeoutError, _error()):
            _LOG.warning("replicas: could not say goodbye")
        finally:
            await _closed(store)

    # The store

    def _open(self) -> Any:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        return Redis.from_url(
            self._url,
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )

    async def _exchange(self) -> None:
        delay_s = _RETRY_S[0]
        while True:
            store = self._open()
            try:
                await self._session(store)
            except (OSError, asyncio.TimeoutError, _error()) as error:
                if self.problem is None:
                    delay_s = _RETRY_S[0]
                self._lost(f"{type(error).__name__}: {error}")
            except Exception as error:  # calls go on without the others, and it is tried again
                _LOG.exception("replicas: exchange failed")
                self._lost(type(error).__name__)
            finally:
                await _closed(store)
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
            delay_s = min(2 * delay_s, _RETRY_S[1])

    def _lost(self, problem: str) -> None:
        if self.problem is None or self.problem == "not connected yet":
            _LOG.warning("replicas: store lost url=%s problem=%s", shown(self._url), problem)
        self.problem = problem

    async def _session(self, store: Any) -> None:
        await self._compare_clocks(store)
        if not self._restored:
            self._restore(await store.get(self._prefix + "learned"))
            self._restored = True
        async with store.pubsub() as pubsub:
            await pubsub.subscribe(self._channel)
            self._workflows.share()
            parts = self._listen(pubsub), self._publish(store), self._catch_up(store)
            await together(parts)

    async def _compare_clocks(self, store: Any) -> None:
        best_s = math.inf
        for _ in range(_COMPARISONS):
            before = self._clock.now()
            seconds, micros = await store.time()
            took_s = self._clock.now() - before
            if took_s < best_s:
                best_s, self._offset_s = took_s, seconds + micros / 1e6 - before - took_s / 2

    # Telling

    async def _publish(self, store: Any) -> None:
        told: dict[str, Elsewhere] = {}
        beat_s = clocks_s = learned_s = self._clock.now()
        while True:
            now = self._clock.now()
            loads = self._loads()
            if loads != told or self._unsent or self._take() or now >= beat_s:
                await self._tell(store, rates=now >= beat_s)
                told = loads
                beat_s = now + _BEAT_S
                if self.problem is not None:
                    _LOG.info("replicas: store in use url=%s", shown(self._url))
                    self.problem = None
            if now >= clocks_s + _CLOCKS_S:
                await self._compare_clocks(store)
                clocks_s = now
            if now >= learned_s + _LEARNED_S:
                await self._write_learned(store)
                learned_s = now
            await asyncio.sleep(INTERVAL_S)

    def _loads(self) -> dict[str, Elsewhere]:
        engines = self._service.coordinator.engines
        owns = ((name, load.own()) for name, load in engines.items())
        return {name: own for name, own in owns if own.calls}

    def _take(self) -> bool:
        """Take what is to be told of workflows; it is kept until that has happened."""
        if not self._unsent:
            self._unsent = self._workflows.changes(_BATCH)
        return bool(self._unsent)

    async def _tell(self, store: Any, *, rates: bool = False, leaving: bool = False) -> None:
        self._take()
        found = [self._encoded(part) for part in self._unsent]
        pipe = store.pipeline(transaction=False)
        for one in found:
            self._keep(pipe, one)
        message = _Message(
            _FORMAT,
            self._group,
            self._clock.now() + self._offset_s,
            leaving,
            {} if leaving else self._loads(),
            self._known_rates() if rates else {},
            found,
        )
        pipe.publish(self._channel, self._mark + _ENCODE(message))
        await pipe.execute()
        self._unsent = []
        self.sent += 1

    def _keep(self, pipe: Any, one: _Workflow) -> None:
        """Write what is told of a workflow where those find it who come later."""
        key = f"{self._prefix}w:{one.id}"
        if one.over:
            pipe.delete(key)
            return
        about = msgspec.structs.replace(one, calls=[], gone=[])
        pipe.hset(key, mapping={"": _ENCODE(about), **{c.name: _ENCODE(c) for c in one.calls}})
        if one.gone:
            pipe.hdel(key, *one.gone)
        pipe.expire(key, _KEPT_S)

    def _known_rates(self) -> dict[str, tuple[_Cost, float | None]]:
        found: dict[str, tuple[_Cost, float | None]] = {}
        for name, load in self._service.coordinator.engines.items():
            learned = load.learned()
            if learned is not None:
                found[name] = (astuple(learned[0]), learned[1])
        return found

    async def _write_learned(self, store: Any) -> None:
        """Write what was learned for routers that start; one router of all does it each time."""
        if await store.set(self._prefix + "writer", self._id, nx=True, ex=_LEARNED_S):
            shapes = self._workflows.shapes.export()
            learned = _Learned(_FORMAT, shapes, {**self._rates, **self._known_rates()})
            await store.set(self._prefix + "learned", _ENCODE(learned), ex=_LEARNED_KEPT_S)

    def _encoded(self, part: WorkflowPart) -> _Workflow:
        off = self._offset_s
        return _Workflow(
            part.workflow_id,
            part.workflow_type,
            part.learned_as,
            part.started_s + off,
            part.last_seen_s + off,
            part.turn,
            part.asked,
            part.asked_s + off,
            part.deadline_s + off,
            part.ordered_by_s + off,
            part.background,
            part.engine,
            part.prefix,
            part.chunk_tokens,
            part.over,
            [
                _Call(
                    self._named(name),
                    call.stage,
                    call.ordinal,
                    call.arrived_s + off,
                    call.prompt_tokens,
                    None if call.ended_s is None else call.ended_s + off,
                    call.uncached_tokens,
                    call.output_tokens,
                )
                for name, call in part.calls.items()
            ],
            [self._named(name) for name in part.gone],
        )

    def _named(self, call_id: str) -> str:
        """Return a name that no call of another router has."""
        return call_id if "/" in call_id else f"{self._id}/{call_id}"

    # Hearing

    async def _listen(self, pubsub: Any) -> None:
        while True:
            found = await pubsub.get_message(ignore_subscribe_messages=True, timeout=_TIMEOUT_S)
            if found is not None:
                self._hear(found["data"])

    def _hear(self, data: bytes) -> None:
        sender, now = data[:_ID_BYTES], self._clock.now()
        try:
            message = _MESSAGE.decode(memoryview(data)[_ID_BYTES:])
        except msgspec.DecodeError:
            self.unreadable += 1
            return
        if message.format != _FORMAT or any(min(load) < 0 for load in message.loads.values()):
            self.unreadable += 1
            return
        at_s = message.at_s - self._offset_s
        if sender == self._mark:
            self._echo_s, self.lag_s = now, max(now - at_s, 0.0)
            return
        self.received += 1
        name = sender.decode("ascii", "replace")
        if message.leaving:
            self._others.pop(name, None)
        elif self._fresh(min(at_s, now)):
            self._others[name] = _Other(message.group, min(at_s, now), message.loads)
        self._heard = True
        for engine, rate in message.rates.items():
            self._note_rate(engine, rate)
        for one in message.workflows:
            self._hear_workflow(one)

    def _fresh(self, at_s: float) -> bool:
        return self._clock.now() - at_s <= self._stale_s

    def _hear_workflow(self, one: _Workflow) -> None:
        off = self._offset_s
        part = WorkflowPart(
            one.id,
            one.type,
            one.learned_as,
            one.started_s - off,
            one.last_seen_s - off,
            one.turn,
            one.asked,
            one.asked_s - off,
            one.deadline_s - off,
            one.ordered_by_s - off,
            one.background,
            one.engine,
            one.prefix,
            one.chunk_tokens,
            {self._own_name(call.name): _seen(call, off) for call in one.calls},
            tuple(map(self._own_name, one.gone)),
            one.over,
        )
        times = part.started_s, part.last_seen_s, part.asked_s, part.deadline_s, part.ordered_by_s
        if any(map(math.isnan, times)):
            self.unreadable += 1
            return
        self._service.coordinator.seen_elsewhere(part, self._clock.now())

    def _own_name(self, name: str) -> str:
        return name.removeprefix(f"{self._id}/")

    def _note_rate(self, engine: str, rate: tuple[_Cost, float | None]) -> None:
        load = self._service.coordinator.engines.get(engine)
        if load is None:
            if len(self._rates) < _BATCH:
                self._rates[engine] = rate
            return
        self._rates.pop(engine, None)
        load.told(StepCost(*rate[0]), rate[1])

    async def _catch_up(self, store: Any) -> None:
        """Read the workflows that others have told of before."""
        cursor: int = 0
        while True:
            cursor, keys = await store.scan(cursor, match=f"{self._prefix}w:*", count=_BATCH)
            pipe = store.pipeline(transaction=False)
            for key in keys:
                pipe.hgetall(key)
            for fields in await pipe.execute() if keys else ():
                self._hear_kept(fields)
            if cursor == 0:
                return

    def _hear_kept(self, fields: dict[bytes, bytes]) -> None:
        try:
            one = _WORKFLOW.decode(fields[b""])
            one.calls = [_CALL.decode(raw) for name, raw in fields.items() if name]
        except (KeyError, msgspec.DecodeError):
            self.unreadable += bool(fields)
            return
        self._hear_workflow(one)

    def _restore(self, raw: bytes | None) -> None:
        if raw is None:
            return
        try:
            learned = _LEARNED.decode(raw)
            if learned.format == _FORMAT:
                self._workflows.shapes.restore(learned.shapes)
                for engine, rate in learned.rates.items():
                    self._note_rate(engine, rate)
        except (msgspec.DecodeError, ValueError) as error:
            self.unreadable += 1
            _LOG.warning("replicas: what was learned cannot be read problem=%s", error)

    # Taking in

    async def _beat(self) -> None:
        """Add up what others have on the engines, whether the store is there or not."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            self._add_up()

    def _add_up(self) -> None:
        gone = [name for name, other in self._others.items() if not self._fresh(other.at_s)]
        for name in gone:
            del self._others[name]
        for engine in [name for name in self._rates if name in self._service.coordinator.engines]:
            self._note_rate(engine, self._rates[engine])
        if not (gone or self._heard):
            return
        self._heard = False
        loads = [o.loads for o in self._others.values() if o.group != self._group]
        engines = {engine for load in loads for engine in load}
        self._service.placed_elsewhere("replicas", {e: _total(e, loads) for e in engines})


class ReplicaMetrics(Collector):
    """Reads what a router knows of others; ``None`` if there can be none."""

    def __init__(self, replicas: Replicas | None) -> None:
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        """Yield every metric."""
        one = self._replicas
        yield gauge("replicas", "Other routers of the same engines that were heard of lately", (),
                    () if one is None else (((), one.others),))  # fmt: skip
        age_s = math.inf if one is None else one.age_s
        yield gauge("replicas_age_seconds", "Time since a message was seen to pass the store", (),
                    () if one is None else (((), age_s),))  # fmt: skip
        counts = () if one is None else (
            (("sent",), one.sent), (("received",), one.received), (("unreadable",), one.unreadable)
        )  # fmt: skip
        yield counter("replicas_messages", "Messages between routers", ("what",), counts)


def _total(engine: str, loads: Iterable[dict[str, Elsewhere]]) -> Elsewhere:
    return Elsewhere.total(load[engine] for load in loads if engine in load)


def _seen(call: _Call, off: float) -> SeenCall:
    seen = SeenCall(call.stage, call.ordinal, call.arrived_s - off, call.prompt_tokens)
    seen.ended_s = None if call.ended_s is None else call.ended_s - off
    seen.uncached_tokens, seen.output_tokens = call.uncached_tokens, call.output_tokens
    return seen


def _error() -> type[Exception]:
    """Return what the client of the store raises."""
    from redis.exceptions import RedisError

    return RedisError


async def _closed(store: Any) -> None:
    with contextlib.suppress(OSError, asyncio.TimeoutError, _error()):
        await store.aclose()
