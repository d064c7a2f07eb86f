"""Random workflows over HTTP while engines misbehave and clients leave: nothing is lost."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter

import aiohttp
import pytest

from hexgen_vllm.testing.fake_server import FakeSettings, Fault
from hexgen_vllm.testing.stand import Stand, open_stand

FAULTS = (
    None, None, None, None, None, Fault("reset"), Fault("reset", 0), Fault("reset", 2),
    Fault("close", 1), Fault("cut", 2), Fault("drip"), Fault("status", status=500),
    Fault("status", status=503), Fault("status", status=429), Fault("status", status=400),
)  # fmt: skip


class Churn:
    """Clients and engines that behave at random, and what the clients saw."""

    def __init__(self, stand: Stand, seed: int) -> None:
        self.stand, self.rng = stand, random.Random(seed)
        self.seen: Counter[str] = Counter()
        self.asked = 0

    async def workflow(self, i: int) -> None:
        for stage in range(self.rng.randint(1, 4)):
            headers = {
                "x-hexgen-workflow-id": f"w{i}",
                "x-hexgen-workflow-deadline-ms": str(self.rng.randint(1, 60_000)),
                "x-hexgen-stage": f"s{stage}",
            }
            for engine in self.stand.engines:
                engine.fault = self.rng.choice(FAULTS)
            self.asked += 1
            try:
                self.seen[await asyncio.wait_for(self.call(headers), self.patience())] += 1
            except asyncio.TimeoutError:
                self.seen["left"] += 1
        async with self.stand.client.post(
            f"{self.stand.router.url}/finish_session?session_id=w{i}"
        ) as answer:
            assert answer.status == 200

    def patience(self) -> float | None:
        return self.rng.uniform(0.0, 0.02) if self.rng.random() < 0.15 else None

    async def call(self, headers: dict[str, str]) -> str:
        tokens = self.rng.randint(1, 20)
        stream = self.rng.random() < 0.5
        options = {"stream": stream, "max_tokens": tokens, "ignore_eos": True}
        async with self.stand.post(headers=headers, **options) as answer:
            text = await answer.text()
            if answer.status != 200:
                assert "error" in json.loads(text)
                return f"error {answer.status}"
        if not stream:
            content = json.loads(text)["choices"][0]["message"]["content"]
        else:
            *events, last = (e.removeprefix("data: ") for e in text.split("\n\n")[:-1])
            if last != "[DONE]":
                assert "error" in json.loads(last)
                return "error event"
            deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
            content = "".join(delta["content"] for delta in deltas)
        assert content == "".join(f" t{i}" for i in range(tokens))
        return "answered"

    async def restarts(self) -> None:
        while True:
            await asyncio.sleep(self.rng.uniform(0.02, 0.1))
            engine = self.rng.choice(self.stand.engines)
            await engine.stop()
            await asyncio.sleep(self.rng.uniform(0.0, 0.05))
            await engine.start()


@pytest.mark.parametrize("policy", ["round_robin", "least_outstanding", "paper", "slack"])
async def test_random_workflows_under_churn(policy: str) -> None:
    settings = [FakeSettings(slots=3, step_s=0.0005, policy="fcfs") for _ in range(3)]
    async with open_stand(
        *settings, policy=policy, dispatch={"hold_depth": 0}, health_check_interval_secs=0.02
    ) as stand:
        churn = Churn(stand, seed=7)
        restarting = asyncio.ensure_future(churn.restarts())
        await asyncio.gather(*(churn.workflow(i) for i in range(40)))
        restarting.cancel()
        await asyncio.gather(restarting, return_exceptions=True)
        for engine in stand.engines:
            engine.fault = None
        await stand.until(lambda: stand.context.ledger.open == 0)
        stand.assert_settled()
        book, seen = stand.context.ledger, churn.seen
        assert seen.total() == churn.asked, "every call has come to an end that its client saw"
        assert book.answered() >= seen["answered"]
        assert sum(book.failed().values()) >= seen.total() - seen["answered"] - seen["left"]
        assert len(stand.context.service.coordinator.workflows) <= seen["left"]
        for engine in stand.engines:
            await stand.until(lambda e=engine: e.running + e.waiting == 0)
            if engine.down:
                await engine.start()
        await stand.all_ready()
        assert await asyncio.gather(*(_whole(stand, {}) for _ in range(20))) == [200] * 20


async def test_held_calls_reach_the_engine_in_order_of_due_time() -> None:
    async with open_stand(
        FakeSettings(slots=1, policy="fcfs"), dispatch={"hold_depth": 0}
    ) as stand:
        (engine,) = stand.engines
        gate = Fault("hang", 1)
        engine.faults.append(gate)
        blocker = asyncio.ensure_future(stand.post(stream=True).__aenter__())
        answer = await blocker
        deadlines = [50, 10, 40, 20, 30]
        waiting = []
        for seconds in deadlines:
            headers = {"x-hexgen-workflow-deadline-ms": str(seconds * 1000), "x-mark": str(seconds)}
            waiting.append(asyncio.ensure_future(_whole(stand, headers)))
            held = len(waiting)
            await stand.until(lambda n=held: stand.context.service.coordinator.held == n)
        answer.close()
        assert await asyncio.gather(*waiting) == [200] * 5
        marks = [int(one.headers["x-mark"]) for one in engine.received[1:]]
        assert marks == sorted(deadlines)
        stand.assert_settled()


async def _whole(stand: Stand, headers: dict[str, str]) -> int:
    async with stand.post(headers=headers) as answer:
        await answer.read()
        return int(answer.status)


async def test_a_connection_error_of_the_client_library_is_not_hidden() -> None:
    """The stand's own client would raise; a router that dropped connections would show here."""
    async with open_stand(FakeSettings(), FakeSettings()) as stand:
        for engine in stand.engines:
            engine.fault = Fault("reset")
        for _ in range(5):
            try:
                async with stand.post() as answer:
                    assert answer.status in (502, 503)
            except aiohttp.ClientError as error:  # pragma: no cover
                pytest.fail(f"the router dropped the connection: {error!r}")
