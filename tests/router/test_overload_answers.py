"""A router with more work than it can do, as its clients see it: who waits, who is refused, how."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest

from hexgen_vllm.testing import ManualClock
from hexgen_vllm.testing.fake_server import FakeSettings, Fault
from hexgen_vllm.testing.stand import Stand, open_stand

STOCK = FakeSettings(slots=1, policy="fcfs")
RATES = {"c0": 0.01, "c1": 1e-5, "c2": 0.0, "p0": 0.01, "p1": 1e-4, "p2": 0.0}
MEASURED = FakeSettings(
    slots=1, stats={"cost": RATES, "fit_error": 0.01, "max_num_seqs": 1, "kv_tokens": 10**5}
)
REASON = "x-llm-d-request-dropped-reason"


class Answer(NamedTuple):
    """What a client got."""

    status: int
    reason: str | None
    text: str


class Queue:
    """A router whose only engine is busy with one call until it is let go."""

    def __init__(self, stand: Stand, blocker: Any) -> None:
        self.stand, self._blocker = stand, blocker

    async def put(
        self, mark: str, headers: dict[str, str] | None = None, waits: bool = True, **body: Any
    ) -> asyncio.Task[Answer]:
        """Send a call and return when the router holds it, or has refused it."""
        coordinator = self.stand.context.service.coordinator
        before = coordinator.held
        task = asyncio.ensure_future(self._ask({"x-mark": mark, **(headers or {})}, body))
        if waits:
            await self.stand.until(lambda: coordinator.held > before or task.done())
        return task

    async def _ask(self, headers: dict[str, str], body: dict[str, Any]) -> Answer:
        async with self.stand.post(headers=headers, **body) as answer:
            if answer.status >= 400:
                assert int(answer.headers["Retry-After"]) >= 1
            return Answer(answer.status, answer.headers.get(REASON), await answer.text())

    def let_go(self) -> None:
        """End the call that the engine is busy with."""
        self._blocker.close()

    def order(self) -> list[str]:
        """Return the marks of calls in the order in which the engine got them."""
        return [one.headers["x-mark"] for one in self.stand.received() if "x-mark" in one.headers]


@asynccontextmanager
async def queue(
    clock: ManualClock | None = None,
    engine: FakeSettings = STOCK,
    **options: Any,
) -> AsyncIterator[Queue]:
    dispatch = {"hold_depth": 0, **options.pop("dispatch", {})}
    async with open_stand(engine, clock=clock, dispatch=dispatch, **options) as stand:
        stand.engines[0].faults.append(Fault("hang", 1))
        first = {"x-hexgen-workflow-id": "begun"}
        blocker = await stand.post(stream=True, headers=first).__aenter__()
        yield Queue(stand, blocker)
        blocker.close()
        await stand.until(lambda: stand.context.ledger.open == 0)
        stand.assert_settled()


def refused(task: asyncio.Task[Answer], status: int, reason: str) -> bool:
    answer = task.result()
    assert f'"code": "{reason}"' in answer.text
    assert "finish_reason" not in answer.text
    return (answer.status, answer.reason) == (status, reason)


@pytest.mark.parametrize(
    ("options", "body"),
    [({"queue_size": 2}, {}), ({"dispatch": {"max_held_tokens": 250}}, {"max_tokens": 100})],
)
async def test_the_queue_has_bounds_in_calls_and_tokens(
    options: dict[str, Any], body: dict[str, Any]
) -> None:
    async with queue(**options) as one:
        waiting = [await one.put(f"{i}", **body) for i in range(2)]
        third = await one.put("too much", **body)
        await asyncio.wait([third])
        assert refused(third, 429, "rejected-saturated")
        one.let_go()
        assert {(await task).status for task in waiting} == {200}


async def test_a_workflow_that_has_begun_stays_when_others_must_go() -> None:
    async with queue(queue_size=1) as one:
        new = await one.put("new", {"x-hexgen-workflow-deadline-ms": "1000"})
        begun = await one.put("begun", {"x-hexgen-workflow-id": "begun"}, waits=False)
        assert await asyncio.wait([new])
        assert refused(new, 429, "rejected-saturated")
        another = await one.put("another", waits=False)
        await asyncio.wait([another])
        assert refused(another, 429, "rejected-saturated")
        one.let_go()
        assert (await begun).status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_who_waits_too_long_is_told_so_and_not_cut_short(stream: bool) -> None:
    clock = ManualClock()
    async with queue(clock, queue_timeout_secs=30.0) as one:
        old = await one.put("old", stream=stream)
        clock.advance(29.0)
        young = await one.put("young")
        clock.advance(2.0)
        one.stand.context.tick()
        await asyncio.wait([old])
        assert refused(old, 504, "rejected-ttl-expired")
        assert not young.done()
        one.let_go()
        assert (await young).status == 200


@pytest.mark.parametrize(
    ("weights", "place"), [({}, 1), ({"greedy": 3.0}, 3), ({"greedy": 1e3}, 4)]
)
async def test_a_tenant_beyond_its_share_waits_for_the_others(
    weights: dict[str, float], place: int
) -> None:
    """Who comes later starts 50 tokens behind and gets up to 50 more than the other, per weight."""
    dispatch = {"fair_window_tokens": 50, "tenant_weights": weights}
    async with queue(dispatch=dispatch) as one:
        tasks = []
        for tenant, calls, ms in (("meek", 1, "90000"), ("greedy", 4, "10000")):
            said = {"x-hexgen-tenant": tenant, "x-hexgen-workflow-deadline-ms": ms}
            tasks += [
                await one.put(tenant, said, max_tokens=100, ignore_eos=True) for _ in range(calls)
            ]
        one.let_go()
        await asyncio.wait(tasks)
        assert one.order().index("meek") == place


async def test_protect_puts_what_is_late_anyway_behind() -> None:
    protect = {"overload": "protect", "background_share": 0.0, "reject_at_entry": False}
    async with queue(dispatch=protect) as one:
        tasks = [
            await one.put("hopeless", {"x-hexgen-workflow-deadline-ms": "1"}),
            await one.put("in time", {"x-hexgen-workflow-deadline-ms": "3600000"}),
        ]
        one.let_go()
        await asyncio.wait(tasks)
        assert one.order() == ["in time", "hopeless"]


async def test_protect_refuses_at_the_door() -> None:
    async with queue(engine=MEASURED, dispatch={"overload": "protect"}) as one:
        (engine,) = one.stand.context.service.coordinator.engines.values()
        await one.stand.until(engine.cost)
        task = await one.put("hopeless", {"x-hexgen-workflow-deadline-ms": "1"})
        await asyncio.wait([task])
        assert refused(task, 429, "rejected-saturated")
        inside = {"x-hexgen-workflow-id": "begun", "x-hexgen-workflow-deadline-ms": "1"}
        begun = await one.put("begun", inside)
        one.let_go()
        assert (await begun).status == 200


@pytest.mark.parametrize(
    ("first", "last"),
    [
        ({"headers": {"X-Vllm-Priority": "-5"}}, {"headers": {"X-Vllm-Priority": "5"}}),
        ({"priority": -5}, {"priority": 5}),
        ({"headers": {"x-dynamo-request-priority": "5"}}, {}),
        ({"vllm_xargs": {"agentic_context": {"priority": 2}}}, {"service_tier": "priority"}),
        ({}, {"service_tier": "flex"}),
        ({}, {"headers": {"x-smg-priority": "bulk"}}),
    ],
)
async def test_priorities_go_before_deadlines_whoever_gives_them(
    first: dict[str, Any], last: dict[str, Any]
) -> None:
    async with queue() as one:
        tasks = []
        for name, said, ms in (("last", last, "1000"), ("first", first, "90000")):
            headers = {"x-hexgen-workflow-deadline-ms": ms, **said.get("headers", {})}
            body = {key: value for key, value in said.items() if key != "headers"}
            tasks.append(await one.put(name, headers, **body))
        one.let_go()
        await asyncio.wait(tasks)
        assert one.order() == ["first", "last"]


async def test_protect_refuses_nobody_whose_time_cannot_be_known() -> None:
    async with queue(dispatch={"overload": "protect"}) as one:
        said = {"x-hexgen-workflow-deadline-ms": "60000"}
        tasks = [await one.put(f"{i}", said, max_tokens=10**5) for i in range(3)]
        assert not any(task.done() for task in tasks)
        one.let_go()
        assert {(await task).status for task in tasks} == {200}
