"""Listens to the KV events of engines, and corrects with them what the router believes.

What an engine's prefix cache holds is guessed from what was sent there
(:mod:`hexgen_vllm.policy.prefix_index`). Events say what it has dropped since, and what
came there by other ways. A guess that is late or wrong costs a prefill and is no error, so nothing
waits for events, and engines without any are guessed about as before.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from hexgen_vllm.policy.prefix_index import PrefixIndex
from hexgen_vllm.router.engines.blocks import Change, EngineBlocks, Prompts
from hexgen_vllm.router.engines.fleet import Fleet
from hexgen_vllm.router.service import Service

_DECODER: Final = msgspec.msgpack.Decoder()
_AGAIN_S: Final = 5.0
_MOST_BATCHES: Final = 100_000  # that wait here
_NUMBER_BYTES: Final = 8
_REPLAY_MS: Final = 5000
_LEARNING: Final = 2  # prompts that are tokenized at once
_MOST_WAITING: Final = 64
_LOG = logging.getLogger(__name__)
Tokenize = Callable[[], Awaitable[tuple[Sequence[int], Sequence[float]] | None]]
"""Returns the tokens of a prompt and where its chunks end."""


class Feed:
    """The events of one target, in order.

    Args:
        prompts: that were tokenized.
        index: returns what is believed of the target, ``None`` while it is not known.
        counts: of batches, by what became of them.
    """

    def __init__(
        self, prompts: Prompts, index: Callable[[], PrefixIndex | None], counts: Counter[str]
    ) -> None:
        self.blocks = EngineBlocks(prompts)
        self._prompts, self._index, self._counts = prompts, index, counts
        self._last, self._made_s = -1, 0.0

    def missing(self, number: int) -> int | None:
        """Return the first batch that is missing before this one, ``None`` if none is."""
        return self._last + 1 if number > self._last + 1 else None

    def take(self, number: int, payload: bytes) -> None:
        """Take in a batch of events; one that came before counts for nothing."""
        try:
            batch = _DECODER.decode(payload)
            made_s, events = float(batch[0]), list(batch[1])
        except (ValueError, TypeError, LookupError):
            self._counts["bad"] += 1
            return
        if number <= self._last:
            if made_s <= self._made_s:
                return
            self._counts["restart"] += 1  # the engine counts from 0 again
            self.blocks.clear()
            self._carry_out(Change(cleared=True))
        elif self.missing(number) is not None and self._last >= 0:
            self._counts["lost"] += number - self._last - 1
            self.blocks.clear()  # which of them are left is not known; the guess stays
        self._last, self._made_s = number, made_s
        self._counts["taken"] += 1
        for event in events:
            try:
                self._carry_out(self.blocks.take(event))
            except (ValueError, TypeError):
                self._counts["bad"] += 1

    def believe(self, keys: Sequence[int]) -> None:
        """Note which chunks are held of a prompt that was just tokenized."""
        held = [key for key in keys if self._prompts.knows(key) and self.blocks.holds(key)]
        self._carry_out(Change(came=held))

    def _carry_out(self, change: Change) -> None:
        index = self._index()
        if index is None:
            return
        if change.cleared:
            index.clear()
        for key in change.gone:
            index.drop(key)
        for key in change.came:
            index.put((key,), self._prompts.at(key)[1])


class KvEvents:
    """Follows all engines whose events can be had.

    Args:
        fleet: the engines.
        service: has what is believed of them.
        counts: of batches, by what became of them.

    Attributes:
        prompts: that were tokenized.
        feeds: by target.
    """

    def __init__(self, fleet: Fleet, service: Service, counts: Counter[str]) -> None:
        self._fleet, self._service, self._counts = fleet, service, counts
        self.prompts = Prompts()
        self.feeds: dict[str, Feed] = {}
        self._listening: dict[str, asyncio.Task[None]] = {}
        self._learning: set[asyncio.Task[None]] = set()
        self._free = asyncio.Semaphore(_LEARNING)

    def tick(self) -> None:
        """Begin to follow engines that have come, and follow those no more that have left."""
        wanted: dict[str, tuple[str, int, int | None]] = {}
        for engine in self._fleet.engines.values():
            if engine.worker.kv_ports is None:
                continue
            events, again = engine.worker.kv_ports
            host = urlsplit(engine.worker.url).hostname or ""
            for rank, target in enumerate(engine.targets):
                replay = None if again is None else again + rank
                wanted[target] = host, events + rank, replay
        for target in [one for one in self._listening if one not in wanted]:
            self._listening.pop(target).cancel()
            del self.feeds[target]
        for target, where in wanted.items():
            if target not in self._listening:
                self.feeds[target] = Feed(self.prompts, partial(self._index, target), self._counts)
                self._listening[target] = asyncio.create_task(self._follow(target, *where))

    def tasks(self) -> list[asyncio.Task[None]]:
        """Return the tasks under way; who stops the router cancels them."""
        return [*self._listening.values(), *self._learning]

    def wants(self, prefix: Sequence[int]) -> bool:
        """Whether a prompt should be tokenized: somebody tells of blocks, and it is new."""
        if not self.prompts.usable or not prefix or self.prompts.knows(prefix[-1]):
            return False
        return len(self._learning) < _MOST_WAITING

    def learn(self, prefix: Sequence[int], chunk_tokens: int, tokenize: Tokenize) -> None:
        """Have a prompt tokenized, at leisure."""
        task = asyncio.create_task(self._learn(prefix, chunk_tokens, tokenize))
        self._learning.add(task)
        task.add_done_callback(self._learning.discard)

    async def _learn(self, prefix: Sequence[int], chunk_tokens: int, tokenize: Tokenize) -> None:
        async with self._free:
            if self.prompts.knows(prefix[-1]):
                return
            found = await tokenize()
        if found is not None:
            self.prompts.learn(prefix, chunk_tokens, *found)
            for feed in self.feeds.values():
                feed.believe(prefix)

    def _index(self, target: str) -> PrefixIndex | None:
        load = self._service.coordinator.engines.get(target)
        return None if load is None else load.prefixes

    async def _follow(self, target: str, host: str, port: int, replay: int | None) -> None:
        while True:
            try:
                await self._listen(target, host, port, replay)
            except Exception:  # whatever it was, it is no call's concern
                _LOG.exception("no KV events for now target=%s", target)
            await asyncio.sleep(_AGAIN_S)

    async def _listen(self, target: str, host: str, port: int, replay: int | None) -> None:
        import zmq.asyncio

        feed, shown = self.feeds[target], f"[{host}]" if ":" in host else host
        with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.IPV6, 1)
            socket.setsockopt(zmq.RCVHWM, _MOST_BATCHES)
            socket.subscribe(b"")
            socket.connect(f"tcp://{shown}:{port}")
            while True:
                frames = await socket.recv_multipart()
                number = _number(frames)
                if number is None:
                    self._counts["bad"] += 1
                    continue
                missing = feed.missing(number)
                if missing is not None and replay is not None:
                    await self._replay(feed, context, f"tcp://{shown}:{replay}", missing)
                feed.take(number, frames[-1])

    async def _replay(self, feed: Feed, context: Any, where: str, begin: int) -> None:
        """Ask for batches from ``begin`` on; what does not come in time is lost."""
        import zmq

        with context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.IPV6, 1)
            socket.connect(where)
            await socket.send_multipart((b"", begin.to_bytes(8, "big")))
            while await socket.poll(_REPLAY_MS):
                frames = await socket.recv_multipart()
                number = _number(frames)
                if number is None:  # the end
                    return
                self._counts["replayed"] += 1
                feed.take(number, frames[-1])
        _LOG.warning("no KV events again from=%s", where)


def _number(frames: Sequence[bytes]) -> int | None:
    """Return the number of a batch, ``None`` for what is none."""
    if len(frames) < 2 or len(frames[-2]) != _NUMBER_BYTES:
        return None
    number = int.from_bytes(frames[-2], "big", signed=True)
    return None if number < 0 else number
