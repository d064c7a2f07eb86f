"""Placements of other systems, and simple rules that are hard to beat, each as published.

| name | score, best first | needs | starves |
|---|---|---|---|
| ``weighted_round_robin`` | turn, in proportion to speed | speeds | nothing |
| ``weighted_least`` | (calls + 1) / speed | speeds | nothing |
| ``power_of_two`` | fewer outstanding tokens of two drawn at random | nothing | nothing |
| ``sticky`` | the workflow's engine; a new one as ``weighted_least`` | speeds | who shares |
| ``wlcaff`` | (calls + 1 + uncached / tokens) / speed | speeds, prefixes | nothing |
| ``llm_d`` | 3 prefix + 2 queue + 2 KV, each 0 to 1 | prefixes, telemetry | slow engines' users |
| ``cache_aware`` | longest prefix, unless loads differ | prefixes | slow engines' users |
| ``dynamo`` | uncached prompt blocks + active blocks | prefixes | slow engines' users |

Speeds are usual calls per second, one at a time (:meth:`EngineLoad.speed`): what an operator would
measure once. Rules that weigh by speed get the truth in the simulator.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from random import Random
from typing import Final

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.policy.calls import Demand
from hexgen_vllm.policy.dispatch import Choice, Claims, Dispatch, Loads
from hexgen_vllm.policy.engine_load import EngineLoad

_BLOCK_TOKENS: Final = 16
_MAX_WORKFLOWS: Final = 100_000


def uncached_share(engine: EngineLoad, demand: Demand) -> float:
    """Return the share of the prompt that the engine would have to compute."""
    prompt = max(demand.call.prompt_tokens, 1)
    return 1.0 - engine.prefixes.match(demand.call) / prompt


def least_weighted(engines: Sequence[EngineLoad]) -> EngineLoad:
    """Return the engine with the fewest calls for its speed, the faster of equals."""
    best, least, fastest = engines[0], float("inf"), 0.0
    for engine in engines:
        v = engine.speed()
        load = (engine.calls + 1) / v
        if load < least or (load == least and v > fastest):
            best, least, fastest = engine, load, v
    return best


class WeightedRoundRobin(Dispatch):
    """Smooth weighted round robin, as in nginx (``ngx_http_upstream_round_robin``)."""

    def __init__(self, options: DispatchOptions) -> None:
        super().__init__(options)
        self._credit: dict[str, float] = {}

    def choose(self, demand: Demand, engines: Loads, claims: Claims, now: float) -> Choice:
        """Return the engine that is owed most."""
        credit, total, best = self._credit, 0.0, engines[0]
        for engine in engines:
            v = engine.speed()
            total += v
            credit[engine.engine_id] = credit.get(engine.engine_id, 0.0) + v
            if credit[engine.engine_id] > credit[best.engine_id]:
                best = engine
        credit[best.engine_id] -= total
        return Choice(best, credit[best.engine_id], "turn")


class WeightedLeast(Dispatch):
    """Weighted least connections, as in LVS, HAProxy and Envoy."""

    def choose(self, demand: Demand, engines: Loads, claims: Claims, now: float) -> Choice:
        """Return the engine with the fewest calls for its speed."""
        engine = least_weighted(engines)
        return Choice(engine, -(engine.calls + 1) / engine.speed(), "fewest_calls")


class PowerOfTwo(Dispatch):
    """Two engines drawn at random, the one with fewer outstanding tokens (Ray Serve LLM)."""

    def __init__(self, options: DispatchOptions) -> None:
        super().__init__(options)
        self._draw = Random(0)

    def choose(self, demand: Demand, engines: Loads, claims: Claims, now: float) -> Choice:
        """Return the less loaded of two."""
        drawn = self._draw.sample(list(engines), min(2, len(engines)))
        best = drawn[0]
        for engine in drawn:
            if engine.outstanding_tokens() < best.outstanding_tokens():
                best = engine
        return Choice(best, -float(best.outstanding_tokens()), "fewest_tokens")


class Sticky(Dispatch):
    """Session affinity: a workflow stays on the engine on which it began.

    A new one begins where :class:`WeightedLeast` would send it. Common in production behind
    consistent hashing or a session cookie; here with the better of the two ways to begin.
    """

    def __init__(self, options: DispatchOptions) -> None:
        super().__init__(options)
        self._home: OrderedDict[str, str] = OrderedDict()

    def choose(self, demand: Demand, engines: Loads, claims: Claims, now: float) -> Choice:
        """Return the workflow's engine."""
        home = self._home.get(demand.call.workflow_id)
        for engine in engines:
            if engine.engine_id == home:
                return Choice(engine, 1.0, "home")
        return Choice(least_weighted(engines), 0.0, "new_home")

    def placed(self, demand: Demand, choice: Choice, now: float) -> None:
        """Remember where the workflow is."""
        self._home[demand.call.workflow_id] = choice.engine.engine_id
        self._home.move_to_end(demand.call.workflow_id)
        if len(self._home) > _MAX_WORKFLOWS:
            self._home.popitem(last=False)


class WlcAff(Dispatch):
    """Weighted least connections that sees prefixes: so many uncached tokens count as a call.

    The best rule of a few lines that we know of; not from anywhere. ``affinity_tokens`` of the
    options is its one constant.
    """

    def __init__(self, options: DispatchOptions) -> None:
        super().__init__(options)
        self._tokens = options.affinity_tokens

    def choose(self, demand: Demand, engines: Loads, claims: Claims, now: float) -> Choice:
        """Return the engine with the lowest sum for its speed."""
        best, least = engines[0], float("inf")
        for engine in engines:
            own = max(demand.call.prompt_tokens - engine.prefixes.match(demand.call), 1)
            load = (engine.calls + 1 + own / self._tokens) / engine.speed()
            if load < least:
                best, least = engine, load
        return Choice(best, -least, "fewest_calls")


class LlmD(Dispatch):
    """The default scorers of llm-d's endpoint picker: prefix 3, queue 2, KV cache 2.

    ``github.com/llm-d/llm-d-inference-scheduler``: each scorer gives 0 to 1, the weighted sum
    decides, ties go round. Queue and KV come from telemetry, as old as its interval.
    """

    PREFIX: Final = 3.0
    QUEUE: Final = 2.0
    KV: Final = 2.0

    def __init__(self, options: DispatchOptions) -> None:
        super().__init__(options)
        self._turn = 0

    def choose(self, demand: Demand, engines: Loads, claims: Claims, now: float) -> Choice:
        """Return the engine with the highest weighted score."""
        queues = [engine.report.waiting or 0 for engine in engines]
        low, high = min(queues), max(queues)
        self._turn += 1
        best, most = engines[0], -1.0
        for index in range(len(engines)):
            i = (index + self._turn) % len(engines)
            engine = engines[i]
            queue = 1.0 if high == low else (high - queues[i]) / (high - low)
            score = self.PREFIX * (1.0 - uncached_share(engine, demand)) + self.QUEUE * queue
            score += self.KV * (1.0 - (engine.report.kv_usage or 0.0))
            if score > most:
                best, most = engine, score
        return Choice(best, most, "weighted_score")


class CacheAware(Dispatch):
    """The cache-aware policy of the SGLang router, vllm-router and SMG, at their defaults.

    Loads that differ by more than 64 calls and by half are balanced; else the longest prefix match
    wins if it is over 0.3 of the prompt; else the engine that has computed least.
    """

    SHARE: Final = 0.3
    ABSOLUTE: Final = 64
    RELATIVE: Final = 1.5

    def __init__(self, options: DispatchOptions) -> None:
        super().__init__(options)
        self._sent: dict[str, int] = {}

    def choose(self, demand: Demand, engines: Loads, claims: Claims, now: float) -> Choice:
        """Return the engine by load or by prefix."""
        calls = [engine.calls for engine in engines]
        low, high = min(calls), max(calls)
        if high - low > self.ABSOLUTE and high > self.RELATIVE * low:
            return Choice(engines[calls.index(low)], -float(low), "fewest_calls")
        shares = [1.0 - uncached_share(engine, demand) for engine in engines]
        longest = max(shares)
        if longest > self.SHARE:
            return Choice(engines[shares.index(longest)], longest, "prefix")
        sent = [self._sent.get(engine.engine_id, 0) for engine in engines]
        return Choice(engines[sent.index(min(sent))], -float(min(sent)), "fewest_tokens")

    def placed(self, demand: Demand, choice: Choice, now: float) -> None:
        """Count the prompt tokens sent to each engine."""
        name = choice.engine.engine_id
        self._sent[name] = self._sent.get(name, 0) + demand.call.prompt_tokens


class Dynamo(Dispatch):
    """The KV router of NVIDIA Dynamo: overlap weight 1, temperature 0.

    cost = prefill blocks to compute, queued ones included + blocks active after it; the lowest
    wins.
    """

    def choose(self, demand: Demand, engines: Loads, claims: Claims, now: float) -> Choice:
        """Return the engine with the lowest cost."""
        prompt = demand.call.prompt_tokens
        best, least = engines[0], float("inf")
        for engine in engines:
            own = max(prompt - engine.prefixes.match(demand.call), 1)
            blocks = engine.queued_prefill_tokens() + own + engine.context_tokens() + prompt
            if blocks < least:
                best, least = engine, float(blocks)
        return Choice(best, -least / _BLOCK_TOKENS, "fewest_blocks")
