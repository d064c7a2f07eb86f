from __future__ import annotations

import asyncio
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from hexgen_vllm.engine.server import stats_api
from hexgen_vllm.engine.server.stats_api import StatsReader, StatsUnavailable


class SlowCore:
    """Answers when the test says so."""

    def __init__(self) -> None:
        self.engine_core = self
        self.core_engines = [b"0"]
        self.calls = 0
        self.answered = asyncio.Event()

    async def _call_utility_async(self, name: str, *, engine: bytes) -> dict[str, int]:
        self.calls += 1
        await self.answered.wait()
        return {"calls": self.calls}


async def test_however_many_ask_one_call_is_on_the_way() -> None:
    core, reader = SlowCore(), StatsReader()
    asking = [asyncio.ensure_future(reader.read(core)) for _ in range(5)]
    await asyncio.sleep(0)
    asking[0].cancel()
    await asyncio.sleep(0)
    core.answered.set()
    assert await asyncio.gather(*asking[1:]) == [[{"calls": 1}]] * 4
    assert await reader.read(core) == [{"calls": 2}]


async def test_who_waits_too_long_is_told_and_the_call_goes_on() -> None:
    core, reader = SlowCore(), StatsReader(timeout_s=0.01)
    for _ in range(2):
        with pytest.raises(StatsUnavailable, match=r"No answer in 0\.01 s") as caught:
            await reader.read(core)
        assert caught.value.status == 503
    core.answered.set()
    assert await reader.read(core) == [{"calls": 1}]


class Ranks:
    """A client of several engine cores."""

    def __init__(self, *answers: dict[str, int] | None) -> None:
        self.engine_core = self
        self.core_engines = list(range(len(answers)))
        self.answers = answers

    async def _call_utility_async(self, name: str, *, engine: int) -> dict[str, int] | None:
        return self.answers[engine]


async def test_every_rank_answers_in_order() -> None:
    assert await StatsReader().read(Ranks({"steps": 1}, {"steps": 2})) == [
        {"steps": 1},
        {"steps": 2},
    ]
    with pytest.raises(StatsUnavailable) as caught:
        await StatsReader().read(Ranks({"steps": 1}, None))
    assert caught.value.status == 404


class Core:
    """Stands for vLLM's engine core."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler


def offered(monkeypatch: pytest.MonkeyPatch) -> Any:
    class Fresh(Core):
        pass

    module = SimpleNamespace(EngineCore=Fresh)
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.core", module)
    stats_api.offer_utility()
    stats_api.offer_utility()
    return Fresh


def test_the_utility_returns_the_schedulers_stats(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = SimpleNamespace(hexgen_stats=lambda: {"slack_s": math.inf})
    assert offered(monkeypatch)(scheduler).hexgen_stats() == {"engine": 0, "slack_s": None}


def test_another_scheduler_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert offered(monkeypatch)(SimpleNamespace()).hexgen_stats() is None
