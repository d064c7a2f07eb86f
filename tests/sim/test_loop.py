"""Events run in a total order."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from hexgen_vllm.errors import HexgenError
from hexgen_vllm.sim.simulator import (
    ARRIVAL,
    DELIVERY,
    STEP_END,
    TICK,
    EventLoop,
)


def test_order_is_time_then_priority_then_insertion() -> None:
    loop, seen = EventLoop(), []
    events = [(t, p, n) for t in (1.0, 2.0) for p in (TICK, STEP_END, ARRIVAL, DELIVERY)
              for n in range(3)]  # fmt: skip
    random.Random(1).shuffle(events)
    for at_s, priority, number in events:
        loop.at(at_s, priority, lambda now, arg: seen.append((now, *arg)), (priority, number))
    loop.run()
    inserted = {event: i for i, event in enumerate(events)}
    assert seen == sorted(events, key=lambda e: (e[0], e[1], inserted[e]))
    assert loop.events == len(events)
    assert loop.now == 2.0


def test_events_may_add_events_now_and_later() -> None:
    loop, seen = EventLoop(), []

    def first(now: float, _: Any) -> None:
        loop.at(now, TICK, lambda t, _: seen.append(("same", t)))
        loop.at(now + 1, TICK, lambda t, _: seen.append(("later", t)))

    loop.at(1.0, ARRIVAL, first)
    loop.run(until_s=1.0)
    assert seen == [("same", 1.0)]
    assert len(loop) == 1
    loop.run()
    assert seen[-1] == ("later", 2.0)


@pytest.mark.parametrize("at_s", [0.5, math.nan, math.inf])
def test_the_past_cannot_be_reached(at_s: float) -> None:
    loop = EventLoop()
    loop.at(1.0, TICK, lambda now, _: None)
    loop.run()
    with pytest.raises(HexgenError, match="cannot be reached"):
        loop.at(at_s, TICK, lambda now, _: None)
