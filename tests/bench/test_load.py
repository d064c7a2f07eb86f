"""Open-loop load against a sender in memory: order, headers, failures, what is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from hexgen_vllm.bench.load import LoadRun
from hexgen_vllm.bench.load_client import Reply
from hexgen_vllm.sim.workloads.workload import CallSpec, WorkflowSpec
from hexgen_vllm.testing import ManualClock
from hexgen_vllm.wire import CallMeta

Behave = Callable[[str, CallSpec], Awaitable[Reply]]


def call(stage: str) -> CallSpec:
    return CallSpec(stage, 10, 3)


FLOW = WorkflowSpec(
    "w", "t", ((call("plan"),), (call("work"), call("work")), (call("check"),)), tenant="gold"
)


async def answer(workflow_id: str, one: CallSpec) -> Reply:
    await asyncio.sleep(0)
    return Reply(latency_s=0.5, ttft_s=0.1, output_tokens=one.output_tokens, engine="e")


class Sender:
    """Notes what is sent and how many calls are open; answers as told."""

    def __init__(self, behave: Behave = answer) -> None:
        self.behave = behave
        self.sent: list[tuple[str, int, CallMeta]] = []
        self.open: dict[str, int] = {}
        self.widest: dict[str, int] = {}

    async def send(self, workflow_id: str, index: int, one: CallSpec, meta: CallMeta) -> Reply:
        self.sent.append((one.stage, index, meta))
        self.open[one.stage] = self.open.get(one.stage, 0) + 1
        self.widest[one.stage] = max(self.widest.get(one.stage, 0), self.open[one.stage])
        try:
            return await self.behave(workflow_id, one)
        finally:
            self.open[one.stage] -= 1


async def test_groups_run_in_sequence_and_their_calls_in_parallel() -> None:
    sender = Sender()
    await LoadRun(sender, ManualClock(), 10.0).play([FLOW])
    assert [(stage, index) for stage, index, _ in sender.sent] == [
        ("plan", 0),
        ("work", 1),
        ("work", 2),
        ("check", 3),
    ]
    assert sender.widest == {"plan": 1, "work": 2, "check": 1}


async def test_calls_say_who_they_are_and_how_much_time_is_left() -> None:
    clock = ManualClock()

    async def slow(workflow_id: str, one: CallSpec) -> Reply:
        clock.advance(4.0)
        return await answer(workflow_id, one)

    sender = Sender(slow)
    (record,) = await LoadRun(sender, clock, 10.0).play([FLOW])
    metas = [meta for _, _, meta in sender.sent]
    assert metas[0] == CallMeta(
        workflow_id="w",
        workflow_type="t",
        workflow_deadline_ms=10_000.0,
        stage="plan",
        tenant="gold",
    )
    # every call takes 4 s of the hand-set clock as soon as it is sent
    assert [meta.workflow_deadline_ms for meta in metas] == [10_000.0, 6_000.0, 2_000.0, 1.0]
    assert [meta.workflow_final for meta in metas] == [None, None, None, True]
    assert record.latency_s == 16.0
    assert not record.on_time


@pytest.mark.parametrize(
    ("hints", "expected", "left"), [("none", None, None), ("output", 3, None), ("all", 3, 2)]
)
async def test_hints(hints: str, expected: int | None, left: int | None) -> None:
    sender = Sender()
    await LoadRun(sender, ManualClock(), 10.0, hints).play([FLOW])
    first = sender.sent[0][2]
    assert (first.expected_output_tokens, first.stages_left) == (expected, left)


async def test_a_last_group_of_several_calls_has_no_final_one() -> None:
    sender = Sender()
    flow = WorkflowSpec("w", "t", ((call("work"), call("work")),))
    await LoadRun(sender, ManualClock(), 10.0).play([flow])
    assert [meta.workflow_final for _, _, meta in sender.sent] == [None, None]


async def test_calls_are_recorded() -> None:
    load = LoadRun(Sender(), ManualClock(), 10.0)
    await load.play([FLOW])
    assert [record.stage for record in load.calls] == ["plan", "work", "work", "check"]
    last = load.calls[-1]
    assert (last.workflow_id, last.prompt_tokens, last.output_tokens) == ("w", 10, 3)
    assert (last.ttft_s, last.latency_s, last.engine, last.error) == (0.1, 0.5, "e", None)


async def test_a_failed_call_ends_its_workflow_after_its_siblings() -> None:
    ended = []

    async def failing(workflow_id: str, one: CallSpec) -> Reply:
        if one.stage != "work" or workflow_id != "bad":
            return await answer(workflow_id, one)
        ended.append(one)
        return Reply(0.1, error="HTTP 500: boom")

    sender = Sender(failing)
    load = LoadRun(sender, ManualClock(), 10.0)
    flows = [WorkflowSpec(name, "t", FLOW.stages) for name in ("bad", "good")]
    bad, good = await load.play(flows)
    assert (bad.error, bad.latency_s, bad.lost) == ("work: HTTP 500: boom", None, False)
    assert good.error is None
    assert good.latency_s is not None
    assert len(ended) == 2
    assert not any(m.workflow_id == "bad" for s, _, m in sender.sent if s == "check")
    assert (load.progress.finished, load.progress.failed, load.progress.open) == (1, 1, 0)


async def test_calls_of_a_graph_wait_for_those_they_name_and_think() -> None:
    slow = asyncio.Event()

    async def held(workflow_id: str, one: CallSpec) -> Reply:
        if one.stage == "slow":
            await asyncio.wait_for(slow.wait(), 30)
        if one.stage == "next":
            slow.set()  # it is sent although the group before it is not through
        return await answer(workflow_id, one)

    stages = (
        (call("first"), call("slow")),
        (CallSpec("next", 10, 3, think_s=0.01, after=(0,)),),
        (CallSpec("last", 10, 3, after=(1, 2)),),
    )
    sender = Sender(held)
    (record,) = await LoadRun(sender, ManualClock(), 10.0).play([WorkflowSpec("w", "t", stages)])
    assert record.error is None
    assert [stage for stage, _, _ in sender.sent] == ["first", "slow", "next", "last"]
    assert [meta.workflow_final for _, _, meta in sender.sent] == [None, None, None, True]


async def test_what_waits_for_a_failed_call_of_a_graph_is_not_sent() -> None:
    async def failing(workflow_id: str, one: CallSpec) -> Reply:
        if one.stage == "first":
            return Reply(0.1, error="HTTP 500: boom")
        return await answer(workflow_id, one)

    stages = ((call("first"),), (CallSpec("next", 10, 3, think_s=5.0, after=(0,)),))
    sender = Sender(failing)
    (record,) = await LoadRun(sender, ManualClock(), 10.0).play([WorkflowSpec("w", "t", stages)])
    assert record.error == "first: HTTP 500: boom"
    assert [stage for stage, _, _ in sender.sent] == ["first"]


async def test_what_is_open_after_the_drain_is_lost() -> None:
    async def hanging(workflow_id: str, one: CallSpec) -> Reply:
        if workflow_id == "stuck":
            await asyncio.Event().wait()
        return await answer(workflow_id, one)

    load = LoadRun(Sender(hanging), ManualClock(), 10.0, drain_s=0.5)
    flows = [WorkflowSpec(name, "t", FLOW.stages) for name in ("fine", "stuck")]
    fine, stuck = await load.play(flows)
    assert not fine.lost
    assert stuck.lost
    assert load.progress.open == 1


async def test_workflows_start_when_due_even_if_earlier_ones_hang() -> None:
    started = asyncio.Event()

    async def first_hangs(workflow_id: str, one: CallSpec) -> Reply:
        if workflow_id == "first":
            await asyncio.wait_for(started.wait(), 30)
        started.set()
        return await answer(workflow_id, one)

    flows = [
        WorkflowSpec("second", "t", FLOW.stages, arrival_s=0.02),
        WorkflowSpec("first", "t", FLOW.stages),
    ]
    records = await LoadRun(Sender(first_hangs), ManualClock(), 10.0).play(flows)
    assert [record.workflow_id for record in records] == ["first", "second"]
    assert all(record.latency_s is not None for record in records)


async def test_latency_counts_from_when_a_workflow_was_due() -> None:
    clock = ManualClock()

    async def slow(workflow_id: str, one: CallSpec) -> Reply:
        clock.advance(1.0)
        return await answer(workflow_id, one)

    late = WorkflowSpec("w", "t", ((call("only"),),), arrival_s=0.01)
    clock_ahead = LoadRun(Sender(slow), clock, 10.0)
    (record,) = await clock_ahead.play([late])
    assert record.latency_s == pytest.approx(0.99)  # the hand-set clock never saw the wait


async def test_a_defect_of_the_sender_ends_the_run() -> None:
    async def broken(workflow_id: str, one: CallSpec) -> Reply:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await LoadRun(Sender(broken), ManualClock(), 10.0).play([FLOW])


async def test_an_empty_workload_is_over_at_once() -> None:
    assert await LoadRun(Sender(), ManualClock(), 10.0).play([]) == ()
