"""Comments to clients that wait: the answer may still come from anywhere."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from hexgen_vllm.testing import ManualClock
from hexgen_vllm.testing.fake_server import FakeSettings, Fault
from hexgen_vllm.testing.stand import CHAT, Stand, open_stand

COMMENT = b": keep-alive\n\n"


async def waiting(stand: Stand, clock: ManualClock, path: str = CHAT) -> Any:
    """Return a streamed call that has got two comments."""
    task = asyncio.ensure_future(stand.post(path, stream=True, max_tokens=3).__aenter__())
    await stand.until(stand.received)
    for _ in range(2):
        clock.advance(15.0)
        stand.context.keep_alives.tick(clock.now())
    answer = await task
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert await answer.content.readexactly(2 * len(COMMENT)) == 2 * COMMENT
    return answer


async def test_the_answer_may_come_from_another_engine() -> None:
    clock = ManualClock()
    async with open_stand(
        *[FakeSettings()] * 2, clock=clock, policy="round_robin", sse_keep_alive_interval=15.0
    ) as stand:
        for engine in stand.engines:
            engine.faults.append(Fault("hang"))
        answer = await waiting(stand, clock)
        stuck = next(i for i, engine in enumerate(stand.engines) if engine.received)
        stand.engines[1 - stuck].faults.clear()
        stand.context.guard.engine_lost(f"engine-{stuck}")
        text = await answer.text()
        assert "keep-alive" not in text
        assert text.endswith("data: [DONE]\n\n")
        assert " t2" in text
        assert stand.context.ledger.answered() == 1
        stand.assert_settled()


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
async def test_an_error_comes_as_an_event(path: str) -> None:
    clock = ManualClock()
    async with open_stand(clock=clock, sse_keep_alive_interval=15.0, disable_retries=True) as stand:
        stand.engines[0].faults.append(Fault("hang"))
        answer = await waiting(stand, clock, path)
        stand.context.guard.engine_lost("engine-0")
        event = (await answer.text()).strip().splitlines()
        assert len(event) == (2 if path == "/v1/messages" else 1)
        said = json.loads(event[-1].removeprefix("data: "))
        assert said["error"]["code"] == "engine-lost"
        stand.assert_settled()
