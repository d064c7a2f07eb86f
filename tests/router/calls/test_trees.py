"""Agents that have others work for them: one deadline for the tree, and one critical path."""

from __future__ import annotations

import json
from typing import Any

import pytest
from multidict import CIMultiDict

from hexgen_vllm import wire
from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.router.calls.intake import CHILD_STAGE, Accepted, Intake
from hexgen_vllm.router.calls.prompt import TokenRatios
from hexgen_vllm.router.endpoints import ENDPOINTS
from hexgen_vllm.router.tenants import ALL_TENANTS, ANYBODY, Client
from hexgen_vllm.testing.fake_settings import FakeSettings
from hexgen_vllm.testing.stand import open_stand
from hexgen_vllm.types import CallResult, EngineReport, EngineSpec, Placement, StepCost

CHAT = next(one for one in ENDPOINTS if one.name == "chat")
COST = StepCost(0.01, 0.0, 0.0, 0.0, 1e-4, 0.0)
TENANT = Client("acme", frozenset((ALL_TENANTS,)), scoped=True)


class World:
    """A router's reading and deciding, at moments of our choice."""

    def __init__(self, client: Client = ANYBODY) -> None:
        self.intake = Intake(TokenRatios(), 60.0, ())
        self.coordinator = Coordinator(DispatchOptions())
        self.coordinator.engine_joined(EngineSpec("e", max_num_seqs=8), 0.0)
        self.coordinator.engine_reported("e", EngineReport(cost=COST))
        self.client = client

    def read(self, now: float, headers: dict[str, str], context: Any = None) -> Accepted:
        body: dict[str, Any] = {"model": "m", "messages": []}
        if context is not None:
            body["vllm_xargs"] = {"agentic_context": context}
        names = CIMultiDict(headers)
        return self.intake.read(
            CHAT, names, json.dumps(body).encode(), now, lambda: "m", client=self.client
        )

    def call(
        self, now: float, headers: dict[str, str], context: Any = None, end_s: float | None = None
    ) -> Placement:
        """Have a call placed; it ends with 10 tokens after 0.1 s, or later."""
        found = self.read(now, headers, context)
        call = self.coordinator.workflows.inherited(found.call)
        (placement,) = self.coordinator.call_arrived(call, now)
        assert isinstance(placement, Placement)
        result = CallResult(True, 10, 0, 10)
        self.coordinator.call_finished(call.call_id, result, end_s or now + 0.1)
        return placement


def root(deadline_s: float | None = 30.0, **more: str) -> dict[str, str]:
    said = {"x-hexgen-workflow-id": "w", "x-hexgen-workflow-type": "fix", **more}
    if deadline_s is not None:
        said["x-hexgen-workflow-deadline-ms"] = str(1000 * deadline_s)
    return said


DYNAMO = {"x-dynamo-session-id": "c", "x-dynamo-parent-session-id": "w"}
CHILDREN: list[tuple[dict[str, str], Any]] = [
    (DYNAMO, None),
    ({"x-session-id": "c", "x-parent-session-id": "w"}, None),
    ({}, {"program_id": "c", "parent_program_id": "w"}),
    ({}, {"program_id": "c", "parent_program_id": "b", "root_program_id": "w"}),
    ({"x-litellm-timeout": "5", **DYNAMO}, None),  # no later call moves a workflow's deadline
]


@pytest.mark.parametrize(("headers", "context"), CHILDREN)
@pytest.mark.parametrize("client", [ANYBODY, TENANT])
def test_a_child_has_the_deadline_of_the_root(
    headers: dict[str, str], context: Any, client: Client
) -> None:
    world = World(client)
    assert world.call(100.0, root()).deadline_s == 130.0
    for now in (105.0, 106.0):
        assert world.call(now, headers, context).deadline_s == 130.0
    assert len(world.coordinator.workflows) == 1
    run = world.coordinator.workflows.get("w" if client is ANYBODY else "w of acme")
    assert run is not None
    assert len(run.calls) == 3
    assert set(run.stage_counts) == {"default", CHILD_STAGE}


def test_once_is_enough_and_of_a_grandchild_too() -> None:
    world = World()
    world.call(100.0, root())
    world.call(101.0, DYNAMO)
    world.call(102.0, {"x-dynamo-session-id": "d", "x-dynamo-parent-session-id": "c"})
    for session in ("c", "d"):
        assert world.call(103.0, {"x-dynamo-session-id": session}).deadline_s == 130.0
    assert len(world.coordinator.workflows) == 1


def test_what_children_do_is_on_the_critical_path_if_somebody_waits() -> None:
    tails = {}
    for blocks in (True, False):
        world = World()
        context = {"program_id": "c", "parent_program_id": "w", "blocks_parent": blocks}
        for i in range(12):
            now = 100.0 * (i + 1)
            first = world.call(now, root())
            child = world.call(now + 1.0, {}, context, end_s=now + 3.0)
            last = world.call(now + 4.0, root(None))
            world.coordinator.workflow_finished("w")
        tails[blocks] = first.tail_s, child.tail_s
        assert child.deadline_s == first.deadline_s
        assert last.tail_s == 0.0
    waited, alone = tails[True], tails[False]
    # Two calls follow and 0.9 + 1 s of the client's; after the child one, and 1 s.
    assert waited[0] == pytest.approx(2 * (10 * 0.01 + 10 * 1e-4) + 1.9)
    assert waited[1] == pytest.approx(10 * 0.01 + 10 * 1e-4 + 1.0)
    assert alone[1] == 0.0
    assert alone[0] == pytest.approx(10 * 0.01 + 10 * 1e-4 + 3.9), "the parent's own calls"


def test_the_end_of_a_child_ends_nothing_but_the_child() -> None:
    world = World()
    world.call(100.0, root())
    last = world.read(101.0, {**DYNAMO, "x-dynamo-session-final": "true"})
    assert last.last
    assert not last.call.final
    assert (last.session_id, last.call.workflow_id) == ("c", "w")
    assert world.read(101.0, root(**{"x-hexgen-workflow-final": "1"})).call.final


def test_a_child_that_nobody_waits_for_has_no_longer_than_the_root() -> None:
    context = {"program_id": "c", "parent_program_id": "w", "blocks_parent": False}
    world = World()
    world.call(100.0, root())
    assert world.call(101.0, {}, {**context, "deadline_seconds": 5}).deadline_s == 106.0
    assert world.call(101.0, {}, {**context, "deadline_seconds": 50}).deadline_s == 130.0
    world.coordinator.workflow_finished("c")
    assert world.coordinator.workflows.get("w") is not None


def test_a_child_of_a_session_without_a_wish_is_a_session() -> None:
    world = World()
    world.call(100.0, {"x-session-id": "w"})
    assert world.call(150.0, DYNAMO).deadline_s == 210.0
    lost = World()
    assert lost.call(150.0, DYNAMO).deadline_s == 210.0, "nothing is known of the parent"


def test_nobody_is_above_himself_and_tenants_are_apart() -> None:
    world = World()
    first = {"x-session-id": "a", "x-parent-session-id": "b"}
    second = {"x-session-id": "b", "x-parent-session-id": "a"}
    assert world.read(1.0, first).call.root == "b"
    assert world.read(1.0, second).call.root is None
    shared = World(TENANT)
    shared.read(1.0, {**DYNAMO, "x-tenant-id": "other"})
    assert shared.read(1.0, {"x-dynamo-session-id": "c"}).call.root is None
    mine = shared.read(1.0, {"x-dynamo-session-id": "c", "x-tenant-id": "other"}).call
    assert mine.workflow_id == mine.root == "w of other"


async def test_engines_hear_of_it() -> None:
    """The child's KV is the child's, its deadline the root's."""
    hints = {"expected_resume": 5, "kv_retention_ttl_seconds": 60}
    async with open_stand(FakeSettings(stats={"ranks": [{}]})) as stand:
        for headers in (root(), {**DYNAMO, "x-dynamo-session-final": "1"}):
            said = {"vllm_xargs": {"agentic_context": hints}}
            async with stand.post(headers=headers, **said) as answer:
                assert answer.status == 200
        first, child = (wire.from_headers(one.headers) for one in stand.received())
    assert (first.workflow_id, first.workflow_final) == ("w", None)
    assert (child.workflow_id, child.workflow_final) == ("c", True)
    assert 0 < (child.workflow_deadline_ms or 0) <= (first.workflow_deadline_ms or 0) <= 30_000
    assert (child.resume_ms, child.keep_ms) == (5000.0, 60_000.0)
