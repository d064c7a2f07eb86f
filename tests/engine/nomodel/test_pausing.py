"""Calls that are left out of steps, in every mode of the engine: tokens are those of a lone run.

A few calls of each mode are part of every run. For many:

    PAUSING_CALLS=300 python -m pytest --timeout=1200 tests/engine/nomodel/test_pausing.py
"""

from __future__ import annotations

import inspect
import os
import random
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler

from hexgen_vllm.engine.scheduler import UrgencyScheduler
from tests.engine.nomodel.conftest import Build
from tests.engine.nomodel.harness import FakeEngine, expected, prompt
from tests.engine.nomodel.swap_harness import SwapEngine
from tests.engine.nomodel.test_mix import chat, warm

# Up to 0.28, vLLM lets no turn of a session write more than its first one was to.
TURNS_HAVE_LENGTHS = "max_tokens" in inspect.getsource(Scheduler._update_request_as_session)
CALLS = int(os.environ.get("PAUSING_CALLS", "60"))

MODES: dict[str, dict[str, Any]] = {
    "swap": {},
    "swap-async": {"async_scheduling": True},
    "swap-async-v2-runner": {"async_scheduling": True, "v2_runner": True},
    "swap-beside": {"beside": True, "async_scheduling": True},
    "swap-by-rates": {"hexgen": {"keep_kv": "auto"}},
    "swap-small-pool": {"host_blocks": 8, "async_scheduling": True},
    "swap-no-prefix-cache": {"prefix_caching": False},
    "swap-small-steps": {"max_batched_tokens": 48, "async_scheduling": True},
    "no-swap": {"hexgen": {"keep_kv": "never"}, "async_scheduling": True},
}


class Mixture:
    """Random calls with and without deadlines, aborts, pauses, and sessions or resets."""

    def __init__(self, engine: FakeEngine, seed: int) -> None:
        self.engine, self.rng, self.sessions = engine, random.Random(seed), seed % 2 == 0
        self.shared = prompt(self.rng, 40, 90)
        self.want: dict[str, list[int]] = {}
        self.histories: dict[str, list[int]] = {}
        self.counts: dict[str, int] = {}  # tokens of a session's first turn
        self.left_out = 0

    def play(self, calls: int) -> None:
        """Send ``calls`` calls, with what may happen between them, and run to the end."""
        rng = self.rng
        for i in range(calls):
            self._call(f"r{i}")
            if self.sessions and rng.random() < 0.15:
                self._turn(f"session{rng.randrange(3)}")
            self._steps(rng.randint(0, 12))
            if rng.random() < 0.1:
                self._abort()
            # A session that waits for its next turn holds KV, and vLLM refuses to reset it.
            if not self.sessions and rng.random() < 0.04:
                self.engine.scheduler.reset_prefix_cache(reset_running_requests=True)
            if rng.random() < 0.05:
                self._pause()
        for name in self.histories:
            self._settle(name)
            self.engine.add(name, [2], 1, resumable=False)
        self.engine.run()

    def check(self) -> None:
        """Every call has the tokens of a lone run, and nothing is left."""
        got = self.engine.tokens
        assert [name for name, tokens in self.want.items() if got[name] != tokens] == []
        self.engine.assert_clean()

    def _call(self, name: str) -> None:
        rng = self.rng
        tokens = (self.shared if rng.random() < 0.3 else []) + prompt(rng, 4, 120)
        urgent = rng.random() < 0.4
        count = rng.randint(2, 60) if urgent else rng.randint(20, 150)
        meta = chat(rng.choice([0.2, 0.6, 2.0, 9.0]), rng.choice([None, count])) if urgent else None
        self.want[name] = want = expected(tokens, count)
        sampling: dict[str, Any] = {}
        if rng.random() < 0.15:
            sampling["stop_token_ids"] = [stop := rng.choice(want)]
            del want[want.index(stop) + 1 :]
        priority = rng.choice([0, 0, 0, 0, -1, 2])
        self.engine.add(name, tokens, count, meta, sampling, priority=priority)

    def _turn(self, name: str) -> None:
        """Send the next turn of a session that has no deadline, once the last one is written."""
        self._settle(name)
        if len(self.histories.get(name, ())) > 100:
            return  # sessions that wait hold their KV: three long ones would leave no room
        tokens, count = prompt(self.rng, 5, 30), self.rng.randint(2, 30)
        first = self.counts.setdefault(name, count)
        count = count if TURNS_HAVE_LENGTHS else first
        history = self.histories.setdefault(name, [])
        if history and not self._whole(name):
            history.pop()  # vLLM drops the token of a turn that was not computed yet
        history += tokens
        out = expected(history, count)
        self.want[name] = self.want.get(name, []) + out
        history += out
        self.engine.add(name, tokens, count, resumable=True)

    def _whole(self, name: str) -> bool:
        """Whether the KV of the last token of a turn is there: only if it was a draft."""
        return False

    def _settle(self, name: str) -> None:
        while len(self.engine.tokens.get(name, ())) < len(self.want.get(name, ())):
            self._steps(1)

    def _steps(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()
            self.left_out += bool(self.engine.scheduler._pauser._out)

    def _abort(self) -> None:
        alive = [n for n in self.engine.scheduler.requests if n in self.want and n[0] == "r"]
        if alive:
            gone = self.rng.choice(alive)
            self.engine.abort(gone)
            del self.want[gone]

    def _pause(self) -> None:
        state = self.rng.choice([PauseState.PAUSED_NEW, PauseState.PAUSED_ALL])
        self.engine.scheduler.set_pause_state(state)
        self.engine.steps(3)
        self.engine.scheduler.set_pause_state(PauseState.UNPAUSED)


@pytest.mark.parametrize(("seed", "mode"), list(enumerate(MODES)))
def test_tokens_are_those_of_a_lone_run(folder: Path, mode: str, seed: int) -> None:
    engine = SwapEngine(folder, **{"blocks": 60, "max_num_seqs": 8, **MODES[mode]})
    warm(engine)
    mixture = Mixture(engine, seed)
    mixture.play(CALLS)
    mixture.check()
    assert mixture.left_out > CALLS // 6, "hardly anybody was ever left out of a step"
    if mode == "no-swap":
        assert not engine.host_kv()["saved_tokens"]
    elif mode != "swap-by-rates":
        assert engine.host_kv()["saved_tokens"] > 0


def test_a_session_that_is_preempted_in_the_step_that_ends_its_turn_goes_on(folder: Path) -> None:
    """It came to the queue twice and stopped the engine; the load is one in which that happens."""
    engine = SwapEngine(
        folder, **{"blocks": 60, "max_num_seqs": 8, **MODES["swap-async-v2-runner"]}
    )
    warm(engine)
    mixture = Mixture(engine, 2)
    mixture.play(300)
    mixture.check()


@pytest.mark.parametrize("scheduler_class", [Scheduler, UrgencyScheduler])
def test_a_turn_of_a_session_is_as_long_as_stock_vllm_lets_it(
    build: Build, scheduler_class: type
) -> None:
    engine = build(scheduler_class)
    engine.add("session", [7] * 20, 5, resumable=True)
    engine.run()
    engine.add("session", [9] * 20, 12, resumable=True)
    engine.run()
    assert len(engine.tokens["session"]) == 5 + (12 if TURNS_HAVE_LENGTHS else 5)


def test_who_is_left_out_is_swapped_when_the_cache_runs_short(folder: Path) -> None:
    """First of all, and without losing a token: what is computed again stays small."""
    again = {}
    for keep in ("always", "never"):
        engine = SwapEngine(
            folder, blocks=60, max_num_seqs=16, prefix_caching=False, hexgen={"keep_kv": keep}
        )
        warm(engine)
        for i in range(8):
            engine.add(f"batch{i}", [5 + i] * 60, 60)
        engine.steps(10)
        before = engine.recomputed()
        engine.add("chat", [99] * 100, 200, chat(1.4, 200))
        while "chat" not in engine.ended:
            engine.step()
            chatting = engine.scheduler.requests.get("chat")
            assert chatting is None or chatting.num_preemptions == 0
        engine.run()
        again[keep] = engine.recomputed() - before
        assert all(engine.tokens[f"batch{i}"] == expected([5 + i] * 60, 60) for i in range(8))
        engine.assert_clean()
    assert again["never"] > 100
    assert again["always"] <= 0.1 * again["never"]
