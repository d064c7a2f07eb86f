"""A call that nobody waits before is placed without a queue, exactly as through it."""

from __future__ import annotations

import random

import pytest

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.policy.protection import OpenCall
from hexgen_vllm.types import (
    Call,
    CallResult,
    Decision,
    EngineKind,
    EngineReport,
    EngineSpec,
    EngineState,
    Placement,
    StepCost,
)

COST = StepCost(0.01, 0.0005, 0.0, 0.0, 1 / 8000, 0.0)
OPTIONS = (
    {},
    {"hold_depth": 0},
    {"overload": "protect", "reject_at_entry": False},
    {"overload": "protect", "background_share": 0.3},
    {"fair_window_tokens": 500},
    {"max_held_calls": 2},
)


class Queued(Coordinator):
    """Every call goes through the queue."""

    def _at_once(self, entry: OpenCall, now: float) -> Placement | None:
        return None


class Counted(Coordinator):
    """Counts the calls that did not."""

    straight = 0

    def _at_once(self, entry: OpenCall, now: float) -> Placement | None:
        found = super()._at_once(entry, now)
        self.straight += found is not None
        return found


def life(made: Coordinator, seed: int) -> list[tuple[float, Decision]]:
    """Play a random life, the same one for equal answers, and return its decisions."""
    rng, now, placed, kinds = random.Random(seed), 0.0, list[str](), ("a", "b")
    for i in range(3):
        models = frozenset(kinds[: 1 + (i + seed) % 2])
        spec = EngineSpec(f"e{i}", models, EngineKind.HEXGEN, max_num_seqs=2 + i)
        made.engine_joined(spec, now)
        made.engine_reported(spec.engine_id, EngineReport(cost=COST.scaled(1 + i)))
    for i in range(120):
        now += rng.expovariate(8.0)
        chance = rng.random()
        if chance < 0.55:
            found = made.call_arrived(one(rng, i, now), now)
        elif chance < 0.9:
            name = placed.pop(rng.randrange(len(placed))) if placed else ""
            found = made.call_finished(name, CallResult(ok=True, output_tokens=20), now)
        elif chance < 0.95:
            state = rng.choice((EngineState.READY, EngineState.DRAINING, EngineState.DOWN))
            found = made.engine_changed(f"e{rng.randrange(3)}", state, now)
        else:
            found = made.tick(now)
        placed += [d.call_id for d in found if isinstance(d, Placement)]
    return list(made.log)


def one(rng: random.Random, i: int, now: float) -> Call:
    return Call(
        f"c{i}", f"w{i // 3}", now, rng.randrange(50, 900), "t", rng.choice("xyz"),
        tenant=rng.choice("pq"), model=rng.choice("ab"), deadline_s=now + rng.uniform(0.5, 9.0),
        priority=rng.choice((0, 0, 1)), final=i % 3 == 2,
    )  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_decisions_are_those_of_the_queue(options: dict[str, object]) -> None:
    straight = 0
    for seed in range(40):
        chosen = DispatchOptions(policy="slack", **options)  # type: ignore[arg-type]
        short, long = Counted(chosen), Queued(chosen)
        assert life(short, seed) == life(long, seed)
        straight += short.straight
    assert straight
