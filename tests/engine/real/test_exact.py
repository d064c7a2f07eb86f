"""Tight KV, random deadlines, aborts, stop strings: the tokens are those of stock vLLM alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
from vllm.sampling_params import StructuredOutputsParams

from hexgen_vllm.engine.scheduler import UrgencyScheduler
from hexgen_vllm.types import StepCost
from hexgen_vllm.wire import CallMeta
from tests.engine.real.conftest import Start
from tests.engine.real.engines import RealEngine

CALLS = 300
TIGHT = {"num_gpu_blocks_override": 24}
STOPS = ["e", " s", "SELECT", "1", ")"]
DEADLINES_MS = (50.0, 1_000.0, 5_000.0, 30_000.0, 200_000.0)


class Load:
    """The same random calls for every engine; they arrive by the count of steps."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        shared = [rng.randrange(2, 1000) for _ in range(96)]
        self.calls: list[tuple[str, list[int], int, CallMeta, dict[str, Any]]] = []
        for i in range(CALLS):
            tokens = [rng.randrange(2, 1000) for _ in range(rng.randint(8, 180))]
            if rng.random() < 0.3:
                tokens = shared + tokens
            most = rng.randint(4, 70)
            meta = CallMeta(
                workflow_deadline_ms=rng.choice(DEADLINES_MS),
                expected_output_tokens=rng.choice([None, most]),
                background=rng.random() < 0.1 or None,
            )
            stop = {"stop": rng.choice(STOPS)} if rng.random() < 0.2 else {}
            self.calls.append((f"r{i}", tokens, most, meta, stop))

    def play(self, engine: RealEngine, abort_share: float = 0.0) -> None:
        """Send every call, abort some, and run to the end."""
        rng = random.Random(1)
        for i, (name, tokens, most, meta, params) in enumerate(self.calls):
            engine.add(name, tokens, most, meta, **params)
            if i >= 8:
                engine.steps(rng.randint(4, 14))
            alive = engine.alive()
            if alive and rng.random() < abort_share:
                engine.abort(rng.choice(alive))
        engine.run()


@pytest.fixture(scope="module")
def stock(start: Start) -> dict[str, tuple[list[int], str]]:
    """Tokens and finish reasons of stock vLLM with plenty of KV."""
    engine = start(num_gpu_blocks_override=2000)
    Load(seed=0).play(engine)
    assert len(engine.ended) == CALLS
    assert set(engine.reasons.values()) == {"stop", "length"}, "no stop string was met"
    return {name: (tokens, engine.reasons[name]) for name, tokens in engine.tokens.items()}


def differing(engine: RealEngine, stock: dict[str, tuple[list[int], str]]) -> list[str]:
    """Return the calls whose tokens are not those of stock vLLM, or not a head if aborted."""
    wrong = []
    for name, (tokens, reason) in stock.items():
        got = engine.tokens.get(name, [])
        if engine.reasons[name] == "abort":
            wrong += [name] if got != tokens[: len(got)] else []
        elif (got, engine.reasons[name]) != (tokens, reason):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("prefix_caching", [True, False], ids=["cache", "no-cache"])
def test_tokens_are_those_of_stock_vllm(
    start: Start,
    stock: dict[str, tuple[list[int], str]],
    prefix_caching: bool,
    async_scheduling: bool,
) -> None:
    engine = start(
        UrgencyScheduler,
        enable_prefix_caching=prefix_caching,
        async_scheduling=async_scheduling,
        **TIGHT,
    )
    assert engine.engine.vllm_config.scheduler_config.async_scheduling == async_scheduling
    Load(seed=0).play(engine, abort_share=0.1)
    assert sorted(engine.ended) == sorted(stock), "every call ends, once"
    assert differing(engine, stock) == []
    assert list(engine.reasons.values()).count("abort") > 10
    preemptions = engine.scheduler.hexgen_stats()["preemptions"]
    assert preemptions["displaced"] > 10
    assert preemptions["kv"] > 10
    engine.assert_clean()


class Forgetful(UrgencyScheduler):
    """Believes that a preempted call still has its first block."""

    def _preempt_request(
        self, request: Any, timestamp: float, drop_stale_output: bool = False
    ) -> None:
        super()._preempt_request(request, timestamp, drop_stale_output)
        request.num_computed_tokens = min(32, request.num_tokens - 1)


def test_wrong_kv_would_be_seen(start: Start, stock: dict[str, tuple[list[int], str]]) -> None:
    engine = start(Forgetful, enable_prefix_caching=False, **TIGHT)
    Load(seed=0).play(engine)
    assert len(differing(engine, stock)) > 20


class Mixed(Load):
    """Calls that need fast steps beside long ones without deadline, which are left out of steps."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        rng = random.Random(seed)
        grammar = {"structured_outputs": StructuredOutputsParams(regex="[a-z ]+")}
        for i, (name, tokens, most, _, params) in enumerate(self.calls):
            if rng.random() < 0.5:
                meta = CallMeta(workflow_deadline_ms=rng.choice((600.0, 1_500.0, 4_000.0)))
                shape = grammar if rng.random() < 0.3 and not params else params
                self.calls[i] = (name, tokens, most, meta, shape)
            else:
                meta = CallMeta(service_class="batch")
                self.calls[i] = (name, tokens, 2 * most, meta, params)


@pytest.fixture(scope="module")
def stock_mixed(start: Start) -> dict[str, tuple[list[int], str]]:
    """Tokens of the mixed calls from stock vLLM with plenty of KV."""
    engine = start(num_gpu_blocks_override=2000)
    Mixed(seed=0).play(engine)
    return {name: (tokens, engine.reasons[name]) for name, tokens in engine.tokens.items()}


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("blocks", [24, 200], ids=["tight", "roomy"])
def test_tokens_of_calls_that_are_left_out_of_steps(
    start: Start,
    stock_mixed: dict[str, tuple[list[int], str]],
    blocks: int,
    async_scheduling: bool,
) -> None:
    engine = start(SlowWhenFull, async_scheduling=async_scheduling, num_gpu_blocks_override=blocks)
    Mixed(seed=0).play(engine, abort_share=0.1)
    assert sorted(engine.ended) == sorted(stock_mixed)
    assert differing(engine, stock_mixed) == []
    assert engine.scheduler.hexgen_stats()["batch_tokens_given_up"] > 200
    assert engine.scheduler.away > 200, "steps that calls with KV were left out of"
    engine.assert_clean()


class SlowWhenFull(UrgencyScheduler):
    """Believes that each call in a step costs 20 ms; counts calls left out of steps."""

    away = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        cost = StepCost(c0=0.005, c1=0.02, c2=0.0, p0=0.0, p1=1e-4, p2=0.0)
        self.hexgen_meter.fit.cost = lambda: cost  # type: ignore[method-assign]

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        scheduled = scheduler_output.num_scheduled_tokens
        self.away += sum(r.request_id not in scheduled for r in self.running)
        return super().update_from_output(scheduler_output, model_runner_output)
