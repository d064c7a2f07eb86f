"""What the runner makes of answers: who is blamed, who goes first, how much is sent at once."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hexgen_vllm.batches import runner as module
from hexgen_vllm.batches.lines import BatchRequest
from hexgen_vllm.batches.runner import LineAnswer, Runner
from hexgen_vllm.batches.store import BatchJob, Disk, StoreLimits, new_id
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.testing.fake_server import FakeSettings
from hexgen_vllm.testing.stand import CHAT
from tests.router.batches.test_batches import created, ended, jsonl, line, opened, sdk

Answers = Callable[[BatchRequest], Awaitable[LineAnswer]]
GOOD = LineAnswer(200, b"{}", "r")


class Sender:
    """Answers requests as a test says, and counts them."""

    def __init__(self, answers: Answers, most: int = 8) -> None:
        self.answers, self._most = answers, most
        self.sent: list[str] = []
        self.at_once = self.most_at_once = 0
        self.at_once_by_call: list[int] = []
        self.room = True

    async def send(self, batch: BatchJob, request: BatchRequest, request_id: str) -> LineAnswer:
        self.sent.append(request.custom_id)
        self.at_once += 1
        self.at_once_by_call.append(self.at_once)
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self.answers(request)
        finally:
            self.at_once -= 1

    def has_room(self, in_flight: int) -> bool:
        return self.room

    def most(self) -> int:
        return self._most


@asynccontextmanager
async def running(
    folder: Path, sender: Sender, *, dies_with: bool = False
) -> AsyncIterator[tuple[Disk, Runner]]:
    disk = Disk(StoreLimits(folder))
    runner = Runner(disk, sender, lambda _: True, dies_with=dies_with)
    task = asyncio.create_task(runner.run())
    try:
        yield disk, runner
    finally:
        task.cancel()
        await asyncio.wait((task,))
        await asyncio.to_thread(disk.close)


async def begin(disk: Disk, owner: str, *names: str) -> BatchJob:
    written = disk.store.begin_upload()
    written.write_bytes(jsonl(*map(line, names)))
    file = await disk.do(disk.store.add_file, written, owner, "in", "batch", None)
    batch = BatchJob(
        id=new_id("batch_"), owner=owner, tenant=owner, endpoint=CHAT, input_file=file.id,
        window="24h", created=0.0, expires=1e12, output_file=new_id("file-"),
        error_file=new_id("file-"),
    )  # fmt: skip
    await disk.do(disk.store.add_batch, batch)
    return batch


async def end(disk: Disk, batch: BatchJob) -> BatchJob:
    while True:
        found = await disk.do(disk.store.batch, batch.owner, batch.id)
        if found.status in ("completed", "failed", "expired", "cancelled"):
            return found
        await asyncio.sleep(0.01)


def names_in(path: Path) -> list[str]:
    return [json.loads(text)["custom_id"] for text in path.read_bytes().splitlines()]


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(module, "_LONGEST_WAIT_S", 0.05)


async def test_a_request_that_brings_engines_down_takes_no_other_with_it(tmp_path: Path) -> None:
    """Whatever is in flight with it fails as well, each time."""
    flight: dict[str, asyncio.Future[LineAnswer]] = {}
    broken = LineAnswer(502, b'{"error": {"code": "engine-lost"}}', "r")

    async def answers(request: BatchRequest) -> LineAnswer:
        name = request.custom_id
        flight[name] = asyncio.get_running_loop().create_future()
        try:
            if name.startswith("poison"):
                await asyncio.sleep(0.01)
                for one in flight.values():
                    if not one.done():
                        one.set_result(broken)
            done, _ = await asyncio.wait((flight[name],), timeout=0.02)
            return broken if done else GOOD
        finally:
            flight.pop(name, None)

    sender = Sender(answers)
    names = [f"r{i}" for i in range(30)]
    poison = [f"poison{i}" for i in range(4)]
    names[5:29:6] = poison
    async with running(tmp_path, sender) as (disk, _):
        batch = await end(disk, await begin(disk, "a", *names))
        assert (batch.completed, batch.failed) == (26, 4)
        assert names_in(disk.store.path(batch.error_file)) == poison
    counts = Counter(sender.sent)
    assert {counts[name] for name in poison} == {5}
    assert max(counts[name] for name in names if name not in poison) < 5


async def test_what_an_engine_cannot_do_holds_nobody_up(tmp_path: Path) -> None:
    """An engine that says 500 to a request is well: others are sent beside it."""

    async def answers(request: BatchRequest) -> LineAnswer:
        await asyncio.sleep(0.01)
        return LineAnswer(502, b'{"error": {"code": "engine-error"}}', "r")

    sender = Sender(answers)
    async with running(tmp_path, sender) as (disk, _):
        batch = await end(disk, await begin(disk, "a", *"abcdefgh"))
        assert (batch.completed, batch.failed) == (0, 8)
    assert set(Counter(sender.sent).values()) == {5}
    last = sender.at_once_by_call[-8:]
    assert max(last) > 1


async def test_a_process_that_dies_with_a_request_gives_it_up_in_the_end(tmp_path: Path) -> None:
    """What was there at its deaths by chance is answered; nothing is lost when it ends in order."""
    names = [f"r{i}" for i in range(12)]
    names[3] = "poison"
    stuck = asyncio.Event()

    async def answers(request: BatchRequest) -> LineAnswer:
        if request.custom_id == "poison":
            died.set()
        if died.is_set():
            await stuck.wait()
        return GOOD

    died = asyncio.Event()
    batch: BatchJob | None = None
    deaths = -1
    while True:
        deaths += 1
        died = asyncio.Event()
        sender = Sender(answers, most=8)
        disk = Disk(StoreLimits(tmp_path))
        runner = Runner(disk, sender, lambda _: True, dies_with=True)
        task = asyncio.create_task(runner.run())
        batch = batch or await begin(disk, "a", *names)
        ending = asyncio.create_task(end(disk, batch))
        waiting = asyncio.create_task(died.wait())
        await asyncio.wait((ending, waiting), return_when=asyncio.FIRST_COMPLETED)
        if ending.done():
            batch = ending.result()
            task.cancel()
            await asyncio.wait((task,))
            break
        await asyncio.sleep(0.1)  # the others that are in flight have been noted
        runner.leads = False  # killed: it cleans up nothing
        for one in (task, ending, waiting):
            one.cancel()
        await asyncio.wait((task, ending, waiting))
        await asyncio.to_thread(disk.close)
    assert batch is not None
    assert deaths == 5
    assert (batch.status, batch.completed, batch.failed) == ("completed", 11, 1)
    (record,) = disk.store.path(batch.error_file).read_bytes().splitlines()
    assert json.loads(record)["custom_id"] == "poison"
    assert json.loads(record)["error"]["code"] == "engine_died"
    await asyncio.to_thread(disk.close)


async def test_batches_take_turns_and_no_tenant_keeps_others_out(tmp_path: Path) -> None:
    async def answers(request: BatchRequest) -> LineAnswer:
        await asyncio.sleep(0.01)
        return GOOD

    sender = Sender(answers, most=4)
    async with running(tmp_path, sender) as (disk, runner):
        many = [await begin(disk, "a", *(f"a{i}.{j}" for j in range(20))) for i in range(40)]
        one = await begin(disk, "b", *(f"b{j}" for j in range(5)))
        runner.wake()
        assert (await end(disk, one)).completed == 5
        found = [await disk.do(disk.store.batch, "a", batch.id) for batch in many]
        assert sum(batch.status == "completed" for batch in found) < 20
        assert sender.most_at_once <= 4


async def test_nothing_new_is_sent_while_others_wait_and_refusals_halve_the_window(
    tmp_path: Path,
) -> None:
    refuse = asyncio.Event()

    async def answers(request: BatchRequest) -> LineAnswer:
        await asyncio.sleep(0.005)
        return LineAnswer(429, b"{}", "r", 0.05) if refuse.is_set() else GOOD

    sender = Sender(answers, most=64)
    async with running(tmp_path, sender) as (disk, runner):
        sender.room = False
        batch = await begin(disk, "a", *(f"r{i}" for i in range(400)))
        await asyncio.sleep(0.3)
        assert sender.sent == []
        sender.room = True
        while runner.window.limit < 32:
            await asyncio.sleep(0.01)
        before = runner.window.limit
        refuse.set()
        while not runner.counts["repeated"]:
            await asyncio.sleep(0.001)
        assert runner.window.limit <= before / 2 + 1
        assert runner.window.paused_s() > 0
        refuse.clear()
        found = await end(disk, batch)
        assert (found.completed, found.failed) == (400, 0)


async def test_an_interactive_call_finds_a_place_beside_a_batch(tmp_path: Path) -> None:
    engine = FakeSettings(stats={"max_num_seqs": 10}, slots=10, step_s=0.02)
    async with opened(tmp_path, engine) as stand, sdk(stand) as client:
        lines = [line(f"r{i}", max_tokens=20, ignore_eos=True) for i in range(60)]
        batch = await created(client, jsonl(*lines))
        await stand.until(lambda: stand.context.ledger.open >= 9)
        for _ in range(5):
            async with stand.post(max_tokens=2, ignore_eos=True) as answer:
                assert answer.status == 200
            assert stand.context.ledger.open <= 9, "a place stayed free"
        batch = await ended(client, batch)
        assert batch.request_counts is not None
        assert batch.request_counts.completed == 60
        assert stand.context.ledger.answered() == 65, "none was refused or sent twice"
        async with stand.get("/metrics") as answer:
            text = await answer.text()
        assert 'hexgen_router_batch_requests_total{outcome="completed"} 60.0' in text
        assert "hexgen_router_batch_calls 0.0" in text


async def test_a_batch_leaves_places_of_a_router_that_has_few(tmp_path: Path) -> None:
    engine = FakeSettings(step_s=0.02)
    async with (
        opened(tmp_path, engine, max_concurrent_requests=10) as stand,
        sdk(stand) as client,
    ):
        lines = [line(f"r{i}", max_tokens=10, ignore_eos=True) for i in range(60)]
        batch = await created(client, jsonl(*lines))
        await stand.until(lambda: stand.context.ledger.open >= 8)
        for _ in range(10):
            async with stand.post(max_tokens=2, ignore_eos=True) as answer:
                assert answer.status == 200
        batch = await ended(client, batch)
        assert batch.request_counts is not None
        assert batch.request_counts.completed == 60
        assert stand.context.ledger.answered() == 70, "none was refused or sent twice"


async def test_a_folder_that_cannot_be_used_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="batch_dir"):
        async with opened(tmp_path / "file"):
            pass


@pytest.mark.parametrize("turns", range(6))
async def test_it_ends_whenever_it_is_told_to(tmp_path: Path, turns: int) -> None:
    """Also in the turn in which it wakes up, when a timeout of Python could lose the word."""

    async def answers(request: BatchRequest) -> LineAnswer:
        return GOOD

    disk = Disk(StoreLimits(tmp_path))
    runner = Runner(disk, Sender(answers), lambda _: True)
    task = asyncio.create_task(runner.run())
    while not runner.leads:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    runner.wake()
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait((task,), timeout=20)
    assert task.done()
    await asyncio.to_thread(disk.close)
