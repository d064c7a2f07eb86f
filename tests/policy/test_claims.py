"""What clients claim orders calls only as far as it can be true, and tenants keep their share."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.policy.claims import MAX_PRIORITY, Ceiling, credible_deadline_s, due_s
from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.policy.overload import FairShares, endangered_from
from hexgen_vllm.types import (
    NO_DEADLINE,
    Call,
    CallResult,
    EngineKind,
    EngineReport,
    EngineSpec,
    Placement,
    StepCost,
)

SERVICE_S, SLOTS, OUTPUT = 0.25, 2, 16
COST = StepCost(SERVICE_S / OUTPUT, 0.0, 0.0, 0.0, 0.0, 0.0)
Claim = Callable[[int, float], dict[str, Any]]


def late(claim: Claim, *, measured: bool, trained: bool = False, **options: Any) -> int:
    """Play 10 honest calls with 5 s each against 60 of a liar; return how many honest are late."""
    made = Coordinator(DispatchOptions(**options))
    made.engine_joined(EngineSpec("e", kind=EngineKind.HEXGEN, max_num_seqs=SLOTS), 0.0)
    if measured:
        made.engine_reported("e", EngineReport(cost=COST))
    calls: dict[str, Call] = {}
    honest: dict[str, float] = {}
    events: list[tuple[float, int, str]] = []
    numbers = itertools.count()
    began_s = 0.0
    for i in range(40 if trained else 0):
        began_s = i * 1.0
        one = Call(f"t{i}", f"t{i}", began_s, 1, max_output_tokens=OUTPUT, tenant="honest",
                   final=True)  # fmt: skip
        calls[one.call_id] = one
        heapq.heappush(events, (began_s, next(numbers), one.call_id))
    began_s += 10.0
    for i in range(60):
        now = began_s + 0.03 * i
        said = {"tenant": "greedy", "workflow_id": f"a{i}", "final": True, **claim(i, now)}
        calls[f"a{i}"] = Call(f"a{i}", arrived_s=now, prompt_tokens=1,
                              max_output_tokens=OUTPUT, **said)  # fmt: skip
        heapq.heappush(events, (now, next(numbers), f"a{i}"))
        if i % 6 == 0:
            calls[f"h{i}"] = Call(f"h{i}", f"h{i}", now, 1, tenant="honest", deadline_s=now + 5.0,
                                  max_output_tokens=OUTPUT)  # fmt: skip
            heapq.heappush(events, (now, next(numbers), f"h{i}"))
    running, free, queue = set[str](), SLOTS, list[str]()
    while events:
        now, _, name = heapq.heappop(events)
        if name in running:
            running.remove(name)
            free += 1
            if name.startswith("h"):
                honest[name] = now
            result = CallResult(ok=True, prompt_tokens=1, output_tokens=OUTPUT)
            found = made.call_finished(name, result, now)
        else:
            found = made.call_arrived(calls[name], now)
        queue += [one.call_id for one in found if isinstance(one, Placement)]
        while free and queue:
            running.add(queue[0])
            free -= 1
            heapq.heappush(events, (now + SERVICE_S, next(numbers), queue.pop(0)))
    assert len(honest) == 10
    return sum(at > calls[name].deadline_s for name, at in honest.items())


CLAIMS: dict[str, Claim] = {
    "1 ms": lambda i, now: {"deadline_s": now + 0.001},
    "1 ms, a tenant each": lambda i, now: {"deadline_s": now + 0.001, "tenant": f"v{i}"},
    "1 ms, the honest tenant": lambda i, now: {"deadline_s": now + 0.001, "tenant": "honest"},
    "1 ms, a type each": lambda i, now: {"deadline_s": now + 0.001, "workflow_type": f"x{i}"},
    "1 ms, one token expected": lambda i, now: {
        "deadline_s": now + 0.001, "expected_output_tokens": 1, "tenant": f"v{i}",
    },
    "1 ms, one workflow": lambda i, now: {
        "deadline_s": now + 0.001, "workflow_id": "all", "tenant": "honest", "final": False,
    },
    "many tokens expected": lambda i, now: {
        "deadline_s": now + 0.001, "expected_output_tokens": 2**31 - 1, "tenant": f"v{i}",
    },
    "many stages to come": lambda i, now: {
        "deadline_s": now + 3600.0, "stages_left": 2**31 - 1, "final": False,
    },
    "just enough": lambda i, now: {"deadline_s": now + 1.2 * SERVICE_S},
    "just enough, few tokens expected": lambda i, now: {
        "deadline_s": now + 1.2 * SERVICE_S, "expected_output_tokens": 1,
    },
    "priority": lambda i, now: {"priority": MAX_PRIORITY},
}  # fmt: skip


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("claim", CLAIMS)
def test_no_claim_makes_the_calls_of_others_late(claim: str, trained: bool, measured: bool) -> None:
    assert late(CLAIMS[claim], measured=measured, trained=trained) == 0


def test_without_shares_a_deadline_that_can_just_be_met_goes_first() -> None:
    """What the shares are for; so the play above has teeth."""
    claim = CLAIMS["just enough"]
    assert late(claim, measured=True, trained=True, fair_window_tokens=0) >= 5


def test_a_ceiling_clamps() -> None:
    one = Ceiling(max_priority=2, min_deadline_s=5.0)
    assert [one.priority(p) for p in (-1000, 0, 2, 3, 2**31)] == [-1000, 0, 2, 2, 2]
    assert one.deadline_s(100.001, 100.0) == 105.0
    assert one.deadline_s(106.0, 100.0) == 106.0
    assert one.deadline_s(NO_DEADLINE, 100.0) == NO_DEADLINE


def test_a_deadline_that_cannot_be_met_is_no_claim() -> None:
    assert credible_deadline_s(12.0, NO_DEADLINE, 60.0, 11.0) == 12.0
    assert credible_deadline_s(10.5, NO_DEADLINE, 60.0, 11.0) == 60.0
    assert credible_deadline_s(10.5, 30.0, 60.0, 11.0) == 30.0, "the one it had stands"
    assert credible_deadline_s(10.5, 9.0, 60.0, 11.0) == 10.5, "a later one is taken at its word"
    assert credible_deadline_s(11.0, 30.0, 60.0, 11.0) == 11.0, "just possible"


def test_nothing_is_due_before_it_came() -> None:
    assert due_s(20.0, 5.0, 10.0) == 15.0
    assert due_s(20.0, 1e9, 10.0) == 10.0
    assert due_s(3.0, 0.0, 10.0) == 10.0
    assert due_s(NO_DEADLINE, 5.0, 10.0) == NO_DEADLINE


def test_engines_are_told_the_deadline_that_orders() -> None:
    honest = Placement("c", "e", "r", due_s=0.6 - 0.1, deadline_s=0.6, tail_s=0.1)
    assert honest.ordered_by_s == 0.6
    clamped = Placement("c", "e", "r", due_s=60.0, deadline_s=0.001, tail_s=2.0)
    assert clamped.ordered_by_s == 62.0
    demoted = Placement("c", "e", "r", deadline_s=5.0, tail_s=2.0, background=True)
    assert demoted.ordered_by_s == 5.0


def test_a_workflow_is_judged_by_the_deadline_that_was_asked_for() -> None:
    made = Coordinator(DispatchOptions())
    made.engine_joined(EngineSpec("e", kind=EngineKind.HEXGEN, max_num_seqs=1), 0.0)
    made.engine_reported("e", EngineReport(cost=COST))
    made.call_arrived(Call("c", "w", 0.0, 1, deadline_s=0.001), 0.0)
    run = made.workflows.get("w")
    assert run is not None
    assert (run.deadline_s, run.ordered_by_s) == (0.001, 60.0)


def test_tokens_taken_count_and_not_those_claimed() -> None:
    shares = FairShares(100, {})
    for tenant in ("liar", "honest"):
        shares.waits(tenant, ())
        shares.served(tenant, 10)
    shares.settled("liar", 500)
    assert shares.ahead(("liar", "honest")) == {"liar"}


def test_an_urgent_tenant_loses_nothing_to_one_that_can_wait() -> None:
    """Shares move a call forward only when it would become late."""
    assert endangered_from(100.0, 0.0, 1.0) == 50.0
    assert endangered_from(100.0, 0.0, 30.0) == 40.0
    assert endangered_from(NO_DEADLINE, 0.0, 30.0) == NO_DEADLINE


def test_junk_tenants_do_not_fill_the_memory() -> None:
    shares = FairShares(None, {})
    for i in range(50_000):
        shares.served(f"junk-{i}", 1)
    assert len(shares._served) <= 8192
