"""``hexgen-vllm bench decide``: what one decision costs, by engines, open and held calls.

A fleet of three kinds of engines has so many calls in flight and so many waiting; then calls come
and end in turn. Figures are microseconds of processor time per arrival and per end of a call, all
that the coordinator does then. Where calls wait, one slow engine has room that nobody wants, which
is the dearest state there is: every event could place somebody, and none does.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.policy import coordinator
from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.report import results
from hexgen_vllm.types import Call, CallResult, EngineReport, EngineSpec, Placement, StepCost

ENGINES: Final = (4, 64, 256, 1000)
OPEN: Final = (100, 10_000)
HELD: Final = (0, 5_000)
POLICIES: Final = ("slack", "least_outstanding")
_FAST: Final = StepCost(c0=0.012, c1=1e-4, c2=4e-9, p0=0.0, p1=8e-5, p2=0.0)
_KINDS: Final = (1.0, 1.7, 3.0)
"""How many times as long as on the fastest a step lasts on each kind of engine."""
_UNWANTED: Final = 60.0
_CHUNKS: Final = 8
_CHUNK_TOKENS: Final = 256
_STAGES: Final = ("link", "draft", "fix", "test")
_CALLS: Final = 12  # of a workflow
_BLOCK: Final = 20  # events between two looks at the clock, which costs some by itself
_PACE: Final = 1e-3  # virtual seconds between two events, each


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hexgen-vllm bench decide``."""
    add = parser.add_argument
    add("--engines", type=int, nargs="+", default=list(ENGINES), metavar="N", help="fleet sizes")
    add("--open", type=int, nargs="+", default=list(OPEN), metavar="N", help="calls in flight")
    add("--held", type=int, nargs="+", default=list(HELD), metavar="N", help="calls that wait")
    add("--events", type=int, default=400, metavar="N", help="arrivals and ends that count, each")
    add("--policies", nargs="+", default=list(POLICIES), metavar="P", help="placement policies")
    add("--json", type=Path, metavar="OUT", help="write the figures here")


def main(args: argparse.Namespace) -> int:
    """Measure and print.

    Raises:
        ConfigError: a number is out of range.
    """
    if min(*args.engines, *args.open, 1) < 1 or min(args.held) < 0 or args.events < _BLOCK:
        raise ConfigError(f"numbers must be at least 1, of held calls 0, of events {_BLOCK}.")
    results.check_writable(args.json)
    compiled = str(coordinator.__file__).endswith(".so")
    print(f"microseconds of processor time, {'compiled' if compiled else 'plain Python'}")
    print(f"{'policy':<20}{'engines':>8}{'open':>8}{'held':>7}{'arrival':>10}{'end':>10}")
    figures: dict[str, Any] = {"compiled": compiled, "cells": []}
    for policy in args.policies:
        worst: dict[str, dict[str, float]] = {}
        for engines in args.engines:
            cells = [
                cell(policy, engines, open_, held, args.events)
                for open_ in args.open
                for held in args.held
            ]
            figures["cells"] += cells
            worst[str(engines)] = {
                name: max(one[name] for one in cells) for name in ("arrival_us", "finish_us")
            }
        if policy == POLICIES[0]:
            figures |= worst
        else:
            figures[policy] = worst
    if args.json:
        results.write(args.json, figures)
    return 0


def cell(policy: str, engines: int, open_: int, held: int, events: int) -> dict[str, Any]:
    """Measure one state, print and return its figures."""
    load = _Load(policy, engines, open_, held)
    events -= events % _BLOCK
    load.events(_BLOCK)
    arrival_s, finish_s = load.events(events)
    found = {
        "policy": policy,
        "engines": engines,
        "open": open_,
        "held": load.held,
        "arrival_us": round(1e6 * arrival_s / events, 1),
        "finish_us": round(1e6 * finish_s / events, 1),
    }
    print(
        f"{policy:<20}{engines:>8}{open_:>8}{load.held:>7}"
        f"{found['arrival_us']:>10,.1f}{found['finish_us']:>10,.1f}",
        flush=True,
    )
    return found


class _Load:
    """A fleet with calls, kept as full as it was at first."""

    def __init__(self, policy: str, engines: int, open_: int, held: int) -> None:
        self._rng = random.Random(7)
        self._number = 0
        self._now = 1000.0
        self._flying: list[Call] = []
        self._wanted_held = held
        # With calls waiting the engines are just full; without, they have half as many again.
        places = -(-open_ // engines)
        slots = max(places if held else -(-places * 3 // 2), 1)
        self._coordinator = Coordinator(
            DispatchOptions(policy=policy, hold_depth=0, max_held_calls=0, max_held_tokens=0)
        )
        for i in range(engines):
            unwanted = held > 0 and engines > 1 and i == engines - 1
            self._join(f"e{i:04}", slots, _UNWANTED if unwanted else _KINDS[i % len(_KINDS)])
        most = open_ if not held else open_ + held
        for _ in range(3 * most // _BLOCK):
            if self.held >= held if held else len(self._flying) >= open_:
                break
            self._arrive(_BLOCK)

    @property
    def held(self) -> int:
        return self._coordinator.held

    def _join(self, name: str, slots: int, times: float) -> None:
        spec = EngineSpec(name, max_num_seqs=slots, kv_tokens=400_000)
        self._note(self._coordinator.engine_joined(spec, self._now))
        cost = _FAST.scaled(times)
        self._coordinator.engine_reported(name, EngineReport(cost=cost, fit_error=0.03))

    def _call(self) -> Call:
        self._number += 1
        rng, workflow = self._rng, self._number // _CALLS
        stage = self._number % _CALLS // 3
        shared = tuple(hash((workflow % 50, i)) for i in range(_CHUNKS // 2))
        own = tuple(hash((self._number, i)) for i in range(_CHUNKS - len(shared)))
        return Call(
            f"c{self._number}",
            f"w{workflow}",
            self._now,
            _CHUNKS * _CHUNK_TOKENS + rng.randrange(_CHUNK_TOKENS),
            "text2sql",
            _STAGES[stage],
            deadline_s=self._now + rng.uniform(20.0, 200.0),
            prefix=shared + own,
            prefix_chunk_tokens=_CHUNK_TOKENS,
        )

    def _note(self, decisions: Sequence[Any]) -> None:
        for one in decisions:
            if isinstance(one, Placement):
                found = self._coordinator.in_flight(one.call_id)
                if found is not None:
                    self._flying.append(found.call)

    def _arrive(self, count: int) -> float:
        """Have calls come, and return the seconds that took."""
        calls = [self._call() for _ in range(count)]
        found = []
        began_s = time.thread_time()
        for call in calls:
            self._now += _PACE
            found.append(self._coordinator.call_arrived(call, self._now))
        took_s = time.thread_time() - began_s
        for decisions in found:
            self._note(decisions)
        return took_s

    def _end(self, count: int) -> float:
        """Have calls that are under way end, and return the seconds that took."""
        self._rng.shuffle(self._flying)
        ending = [self._flying.pop() for _ in range(min(count, len(self._flying)))]
        ends = [
            (call.call_id, CallResult(True, call.prompt_tokens, 1024, self._rng.randrange(20, 300)))
            for call in ending
        ]
        found = []
        began_s = time.thread_time()
        for call_id, result in ends:
            self._now += _PACE
            found.append(self._coordinator.call_finished(call_id, result, self._now))
        took_s = time.thread_time() - began_s
        for decisions in found:
            self._note(decisions)
        return took_s

    def events(self, count: int) -> tuple[float, float]:
        """Return the seconds that so many arrivals took, and so many ends."""
        arrivals = ends = 0.0
        for _ in range(max(count // _BLOCK, 1)):
            arrivals += self._arrive(_BLOCK)
            ends += self._end(_BLOCK)
        return arrivals, ends
