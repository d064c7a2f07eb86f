"""What clusters share: they are left stopped, and what died is started again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from hexgen_vllm.cluster import ClusterSpec, EngineEntry, ProcessFailed
from hexgen_vllm.cluster.processes import Process, keep
from hexgen_vllm.cluster.supervisor import Running
from hexgen_vllm.testing.manual_clock import ManualClock

SPEC = ClusterSpec(engines=(EngineEntry(name="a", model="m"),), restart_after_s=0.01)


class Told(Running):
    """A cluster that notes what it is told, and may not start."""

    def __init__(self, problem: BaseException | None = None) -> None:
        self.told: list[str] = []
        self._problem = problem

    def summary(self) -> str:
        return "nothing"

    async def start(self) -> None:
        self.told.append("start")
        if self._problem is not None:
            raise self._problem

    async def watch(self) -> None:
        self.told.append("watch")

    async def stop(self) -> None:
        self.told.append("stop")

    def kill(self) -> None:
        self.told.append("kill")


async def test_a_cluster_is_stopped_when_it_is_left() -> None:
    async with Told() as cluster:
        assert cluster.told == ["start"]
    assert cluster.told == ["start", "stop"]


@pytest.mark.parametrize("problem", [ProcessFailed("no luck"), asyncio.CancelledError()])
async def test_a_cluster_that_does_not_start_is_stopped(problem: BaseException) -> None:
    cluster = Told(problem)
    with pytest.raises(type(problem)):
        async with cluster:
            raise AssertionError("it did not start")
    assert cluster.told == ["start", "stop"]


async def test_what_dies_is_started_again_ever_later_whether_or_not_it_starts(
    tmp_path: Path,
) -> None:
    said: list[str] = []
    process = Process("engine a", "http://a", ("false",), {}, tmp_path / "a.log")
    await process.start()
    problems = iter([None, ProcessFailed("engine a was not healthy"), asyncio.CancelledError()])

    async def start() -> None:
        await process.start()
        problem = next(problems)
        if problem is not None:
            raise problem

    with pytest.raises(asyncio.CancelledError):
        await keep(process, start, SPEC, clock=ManualClock(), report=said.append)
    assert said[0] == "engine a: died with exit code 1, again in 0.01 s"
    assert said[1] == "engine a: died with exit code 1, again in 0.02 s"
    assert said[2] == "engine a was not healthy"
    assert said[3].endswith(", again in 0.04 s")
    assert len(said) == 4
    await process.stop(1.0)
