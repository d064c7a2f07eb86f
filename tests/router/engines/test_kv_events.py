"""What engines say of their KV blocks corrects what the router believes of them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import zmq.asyncio

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.policy.prefix_index import PrefixIndex
from hexgen_vllm.router.engines.blocks import EngineBlocks, Prompts
from hexgen_vllm.router.options import Worker, parse_worker
from hexgen_vllm.testing import fake_tokens
from hexgen_vllm.testing.fake_server import FakeServer, FakeSettings
from hexgen_vllm.testing.stand import Stand, open_stand

SIZE = 16
COMPLETIONS = "/v1/completions"


def stored(tokens: Sequence[int], salt: int = 0, **more: Any) -> dict[str, Any]:
    """Return the event of all whole blocks of a prompt, of whose hashes only equality counts."""
    whole = len(tokens) // SIZE * SIZE
    return {
        "type": "BlockStored",
        "block_hashes": names(tokens, salt),
        "parent_block_hash": None,
        "token_ids": [*tokens[:whole]],
        "block_size": SIZE,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        **more,
    }


def names(tokens: Sequence[int], salt: int = 0) -> list[int]:
    return [
        hash((salt, tuple(tokens[: i + SIZE]))) % 2**63
        for i in range(0, len(tokens) // SIZE * SIZE, SIZE)
    ]


def removed(hashes: Sequence[int]) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU"}


class Publisher:
    """Publishes events as vLLM does, and sends them again when asked."""

    def __init__(self, context: zmq.asyncio.Context, replays: bool) -> None:
        self._pub, self._router = context.socket(zmq.PUB), context.socket(zmq.ROUTER)
        self.port = self._pub.bind_to_random_port("tcp://127.0.0.1")
        self.replay_port = self._router.bind_to_random_port("tcp://127.0.0.1")
        self._sent: list[bytes] = []
        self._task = asyncio.ensure_future(self._replay()) if replays else None

    @property
    def said(self) -> str:
        again = "" if self._task is None else f"&kv_replay={self.replay_port}"
        return f"?kv_events={self.port}{again}"

    async def publish(self, *events: Any, heard: bool = True) -> None:
        """Send a batch, or only keep it as one that got lost on its way."""
        self._sent.append(msgspec.msgpack.encode([time.time(), list(events), 0]))
        number = (len(self._sent) - 1).to_bytes(8, "big")
        if heard:
            await self._pub.send_multipart((b"", number, self._sent[-1]))

    def restart(self) -> None:
        self._sent.clear()

    async def _replay(self) -> None:
        while True:
            client, _, begin = await self._router.recv_multipart()
            for i in range(int.from_bytes(begin, "big"), len(self._sent)):
                number = i.to_bytes(8, "big")
                await self._router.send_multipart((client, b"", b"", number, self._sent[i]))
            end = (-1).to_bytes(8, "big", signed=True)
            await self._router.send_multipart((client, b"", b"", end, b""))

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._pub.close(0)
        self._router.close(0)


@asynccontextmanager
async def followed(replays: bool = True) -> AsyncIterator[tuple[Stand, list[Publisher]]]:
    """Open a stand with two engines that publish events."""
    with zmq.asyncio.Context() as context:
        publishers = [Publisher(context, replays) for _ in range(2)]
        try:
            async with _stand(publishers) as stand:
                yield stand, publishers
        finally:
            for publisher in publishers:
                publisher.close()


@asynccontextmanager
async def _stand(publishers: Sequence[Publisher]) -> AsyncIterator[Stand]:
    settings = FakeSettings(event_tokens=(1,), default_tokens=1)
    async with FakeServer(settings) as one, FakeServer(settings) as other:
        urls = [
            f"engine-{i}={engine.url}{publisher.said}"
            for i, (engine, publisher) in enumerate(zip((one, other), publishers, strict=True))
        ]
        async with open_stand(worker_urls=tuple(urls), wait=False) as stand:
            stand.engines[:] = [one, other]
            await stand.all_ready()
            await stand.until(lambda: len(stand.context.kv_events.feeds) == 2)
            book = stand.context.ledger.kv_events
            for publisher in publishers:  # until subscriptions have arrived
                taken = book["taken"]
                while book["taken"] == taken:
                    await publisher.publish(stored(range(64)))
                    await asyncio.sleep(0.02)
            yield stand


def prompt(i: int = 0) -> str:
    return f"{i} " + "some words of a long prompt " * 200


def index(stand: Stand, i: int) -> PrefixIndex:
    return stand.context.service.coordinator.engines[f"engine-{i}"].prefixes


async def asked(stand: Stand, text: str, engine: int | None = None) -> tuple[int, Any]:
    """Send a prompt; return where it went, and the call when its prompt has been tokenized."""
    events, calls = stand.context.kv_events, []
    usual = type(stand.context.service).place

    async def place(self: Any, call: Any) -> Any:
        calls.append(call)
        if engine is not None:
            call.engine = f"engine-{engine}"
        return await usual(self, call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(stand.context.service), "place", place)
        body = stand.body(COMPLETIONS, prompt=text, max_tokens=1, stream=True)
        async with stand.client.post(stand.router.url + COMPLETIONS, json=body) as answer:
            await answer.read()
            where = int(answer.headers["x-hexgen-engine"][-1])
    await stand.until(lambda: events.prompts.knows(calls[0].prefix[-1]))
    return where, calls[0]


async def test_what_an_engine_drops_is_believed_no_more() -> None:
    async with followed() as (stand, publishers):
        where, call = await asked(stand, prompt())
        tokens = list(prompt().encode())
        assert index(stand, where).match(call) >= 5 * call.prefix_chunk_tokens
        await publishers[where].publish(stored(tokens))
        blocks = names(tokens)
        await publishers[where].publish(removed(blocks[len(blocks) // 2 :]))
        await stand.until(lambda: index(stand, where).match(call) < 4 * call.prefix_chunk_tokens)
        assert index(stand, where).match(call) >= 2 * call.prefix_chunk_tokens
        await publishers[where].publish({"type": "AllBlocksCleared"})
        await stand.until(lambda: index(stand, where).match(call) == 0)


async def test_a_prompt_that_came_another_way_draws_calls() -> None:
    """Nobody sent it there through this router."""
    async with followed() as (stand, publishers):
        where, call = await asked(stand, prompt())
        other = 1 - where
        assert index(stand, other).match(call) == 0
        await publishers[other].publish(stored(list(prompt().encode()), salt=5))
        await publishers[where].publish({"type": "AllBlocksCleared"})
        await stand.until(lambda: index(stand, where).match(call) == 0)
        await stand.until(lambda: index(stand, other).match(call) >= 4 * call.prefix_chunk_tokens)
        for _ in range(3):
            assert (await asked(stand, prompt()))[0] == other


async def test_what_was_there_before_is_known_once_it_is_tokenized() -> None:
    async with followed() as (stand, publishers):
        other_text = prompt(7)
        for publisher in publishers:
            await publisher.publish(stored(list(other_text.encode())))
        await stand.until(
            lambda: all(len(f.blocks) for f in stand.context.kv_events.feeds.values())
        )
        where, call = await asked(stand, other_text)
        await stand.until(
            lambda: index(stand, 1 - where).match(call) >= 4 * call.prefix_chunk_tokens
        )


@pytest.mark.parametrize("replays", [True, False])
async def test_lost_events_come_again_or_leave_a_guess(replays: bool) -> None:
    async with followed(replays) as (stand, publishers):
        where, call = await asked(stand, prompt())
        tokens = list(prompt().encode())
        await publishers[where].publish(stored(tokens))
        await publishers[where].publish(removed(names(tokens)), heard=False)
        await publishers[where].publish()
        book = stand.context.ledger.kv_events
        if replays:
            await stand.until(lambda: index(stand, where).match(call) == 0)
            assert book["lost"] == 0
            assert book["replayed"] >= 1
        else:
            await stand.until(lambda: book["lost"] == 1)
            assert index(stand, where).match(call) > 0  # nobody knows; a prefill at worst


async def test_an_engine_that_counts_anew_holds_nothing() -> None:
    async with followed() as (stand, publishers):
        where, call = await asked(stand, prompt())
        await publishers[where].publish(stored(list(prompt().encode())))
        publishers[where].restart()
        await publishers[where].publish()
        await stand.until(lambda: stand.context.ledger.kv_events["restart"] == 1)
        assert index(stand, where).match(call) == 0


JUNK: tuple[Any, ...] = (
    {"type": "BlockStored"},
    {"type": "BlockStored", "block_hashes": [[1]], "token_ids": [1] * 16, "block_size": 16},
    {"type": "BlockStored", "block_hashes": [1], "token_ids": [1], "block_size": 16},
    {"type": "BlockStored", "block_hashes": [1], "token_ids": [{}] * 16, "block_size": 16},
    {"type": "BlockRemoved", "block_hashes": [{}]},
    {"type": "BlockRemoved", "block_hashes": 3},
    {"type": "Other"},
    ["BlockStored"],
    [],
    None,
    7,
)


async def test_junk_is_counted_and_calls_go_on() -> None:
    async with followed() as (stand, publishers):
        where, call = await asked(stand, prompt())
        for event in JUNK:
            await publishers[where].publish(event)
        await publishers[where].publish({"type": "AllBlocksCleared"})
        await stand.until(lambda: index(stand, where).match(call) == 0)
        assert stand.context.ledger.kv_events["bad"] > 0
        await asked(stand, prompt())
        stand.assert_settled()


def test_events_of_older_engines_are_lists() -> None:
    prompts = Prompts()
    prompts.use(SIZE)
    blocks, tokens = EngineBlocks(prompts), list(range(64))
    event = stored(tokens)
    fields = ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id")
    blocks.take(["BlockStored", *(event[name] for name in fields)])
    prompts.learn((1, 2), 32, tokens, (32.0, 64.0))
    assert blocks.holds(1)
    assert blocks.holds(2)
    blocks.take(["BlockRemoved", names(tokens)[2:]])
    assert blocks.holds(1)
    assert not blocks.holds(2)


@pytest.mark.parametrize("more", [
    {"lora_name": "a", "lora_id": 1}, {"extra_keys": [["salt"]] * 4}, {"medium": "CPU"},
    {"group_idx": 1}, {"parent_block_hash": 99}, {"block_size": 12},
])  # fmt: skip
def test_blocks_that_hold_more_or_less_than_tokens_count_for_nothing(more: dict[str, Any]) -> None:
    prompts = Prompts()
    prompts.use(SIZE)
    blocks, tokens = EngineBlocks(prompts), list(range(64))
    blocks.take(stored(tokens, **more))
    prompts.learn((1,), 64, tokens, (64.0,))
    assert not blocks.holds(1)


def tails(rng: random.Random) -> Iterator[list[int]]:
    """Yield prompts that share beginnings."""
    for _ in range(40):
        base = [rng.randrange(2)] * 48
        yield base + [rng.randrange(3) for _ in range(rng.randrange(80))]


@pytest.mark.parametrize("seed", range(5))
def test_what_is_held_is_what_was_stored_and_not_removed(seed: int) -> None:
    rng = random.Random(seed)
    prompts = Prompts()
    blocks, truth = EngineBlocks(prompts), set()
    known = list(tails(rng))
    blocks.take(stored(known[0]))
    blocks.take({"type": "AllBlocksCleared"})
    for i, tokens in enumerate(known):
        ends = [float(e) for e in range(SIZE, len(tokens) + 1, SIZE)]
        prompts.learn([hash((tuple(tokens[: int(e)]),)) for e in ends], SIZE, tokens, ends)
        assert all(prompts.knows(hash((tuple(tokens[: int(e)]),))) for e in ends), i
    for _ in range(300):
        tokens = rng.choice(known)
        if rng.random() < 0.5:
            blocks.take(stored(tokens))
            truth |= {tuple(tokens[:e]) for e in range(SIZE, len(tokens) + 1, SIZE)}
        else:
            gone = rng.randrange(0, len(tokens), SIZE) + SIZE
            if gone <= len(tokens):
                blocks.take(removed([names(tokens[:gone])[-1]]))
                truth.discard(tuple(tokens[:gone]))
        for tokens in known:
            for e in range(SIZE, len(tokens) + 1, SIZE):
                assert blocks.holds(hash((tuple(tokens[:e]),))) is (tuple(tokens[:e]) in truth)


def test_ports_stand_in_the_url_of_the_engine() -> None:
    found = parse_worker("a=http://h:1?kv_events=5557&kv_replay=5558", "x")
    assert found == Worker("a", "http://h:1", None, None, (5557, 5558))
    assert parse_worker("http://h:1?kv_events=1", "x").kv_ports == (1, None)


@pytest.mark.parametrize(
    "query",
    [
        "kv_events=0",
        "kv_events=70000",
        "kv_events=tcp://h:1",
        "kv_replay=5",
        "kv_events=1&kv_events=2",
    ],
)
def test_other_ports_are_refused(query: str) -> None:
    with pytest.raises(ConfigError, match="worker_urls"):
        parse_worker(f"http://h:1?{query}", "x")


def test_fake_engines_tokenize_what_they_are_sent() -> None:
    """Else nothing here would be shown."""
    assert fake_tokens.prompt_ids(COMPLETIONS, {"prompt": "ab"}) == [97, 98]
