"""The cache in runs behaves as one that keeps every block."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from hexgen_vllm.policy.returns import WorkflowKv
from hexgen_vllm.sim.engine.prefix_cache import BlockPool, Holding
from hexgen_vllm.sim.workloads.prompts import (
    chunk_hashes,
    links,
    spans,
)
from hexgen_vllm.sim.workloads.workload import Layer
from tests.sim.block_cache import Block, PlainCache

SIZE = 16


@dataclass
class Running:
    """A sequence in both caches."""

    name: int
    layers: tuple[Layer, ...]
    full: int  # full blocks of the whole sequence
    partial: bool
    holding: Holding = field(init=False)
    prompt: list[Block] = field(init=False)

    def __post_init__(self) -> None:
        chain = links(self.layers, SIZE)
        self.holding = Holding(chain, [])
        shared = [(key, i) for key, first, end in chain for i in range(first, end)]
        own = range(len(shared), self.full)
        self.prompt = shared[: self.full] + [(-self.name, i) for i in own]

    @property
    def blocks(self) -> int:
        return self.full + self.partial


def drawn(rng: random.Random, name: int) -> Running:
    layers = [Layer(f"t{rng.randrange(3)}", rng.choice((20, 33, 64, 100)))]
    if rng.random() < 0.7:
        layers.append(Layer(f"s{rng.randrange(3)}", rng.choice((5, 40, 48))))
    if rng.random() < 0.3:
        layers.append(Layer(f"w{rng.randrange(2)}", 31))
    elif rng.random() < 0.5:
        layers.append(Layer(f"own{name // 3}", rng.choice((16, 50, 90))))
    shared = sum(layer.tokens for layer in layers) // SIZE
    return Running(name, tuple(layers), shared + rng.randrange(5), rng.random() < 0.8)


@pytest.mark.parametrize("lets_go", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_hits_free_blocks_and_evictions_are_those_of_single_blocks(
    seed: int, lets_go: bool
) -> None:
    rng = random.Random(seed)
    total = rng.choice((30, 60, 200))
    pool, plain = BlockPool(total), PlainCache(total)
    running: list[Running] = []
    kv, let_go = WorkflowKv(1000), 0
    for name in range(1, 400):
        call = drawn(rng, name)
        kv.used([link.key for link in call.holding.chain], f"w{name // 3}")
        hit = pool.lookup(call.holding.chain, call.full)
        assert hit.blocks == plain.hit(call.prompt, call.full)
        assert hit.idle == plain.idle_hits(call.prompt, hit.blocks)
        if call.blocks - hit.blocks + hit.idle <= pool.free:
            pool.adopt(call.holding, hit.blocks)
            plain.hold(call.prompt[: hit.blocks])
            pool.grow(call.holding, call.blocks)
            plain.take(call.blocks - hit.blocks)
            pool.register(call.holding, call.full)
            plain.hold(call.prompt[hit.blocks : call.full])
            running.append(call)
        while running and (pool.free < total // 4 or rng.random() < 0.4):
            ended = running.pop(rng.randrange(len(running)))
            pool.drop(ended.holding, ended.full)
            plain.drop(ended.prompt, int(ended.partial))
            if lets_go and rng.random() < 0.5:
                over = kv.over(f"w{ended.name // 3}")
                let_go += len(over)
                pool.let_go(over)
                plain.let_go(over)
        assert pool.free == plain.free
    assert bool(let_go) == lets_go
    for call in running:
        pool.drop(call.holding, call.full)
    assert pool.free == total
    assert pool.usage() == 0.0


def test_a_preempted_call_finds_its_own_blocks_again() -> None:
    pool = BlockPool(10)
    holding = Holding(links((Layer("t", 32),), SIZE), [])
    pool.grow(holding, 5)
    pool.register(holding, 4)
    pool.drop_keeping(holding, 4)
    assert pool.lookup(holding.chain, 9) == (4, 4)
    pool.take(7)  # six without a hash, then the tail of what it left
    assert pool.lookup(holding.chain, 9) == (3, 3)
    assert pool.lookup(links((Layer("t", 48),), SIZE), 9).blocks == 2


def test_a_prefix_computed_twice_counts_once() -> None:
    pool = BlockPool(20)
    first, second = (Holding(links((Layer("t", 64),), SIZE), []) for _ in range(2))
    for holding in (first, second):
        pool.grow(holding, 4)
        pool.register(holding, 2)
    pool.register(first, 4)
    pool.register(second, 4)
    assert pool.copied == 4
    pool.drop(first, 4)
    assert pool.lookup(first.chain, 9) == (4, 0)
    pool.drop(second, 4)
    assert pool.free == 20


def test_without_caching_nothing_is_found() -> None:
    pool = BlockPool(10, caching=False)
    holding = Holding(links((Layer("t", 64),), SIZE), [])
    pool.grow(holding, 4)
    pool.register(holding, 4)
    pool.drop(holding, 4)
    assert pool.lookup(holding.chain, 9) == (0, 0)
    assert pool.free == 10


def test_exclusive_blocks_are_what_preempting_frees() -> None:
    pool = BlockPool(30)
    long, short = (Holding(links((Layer("t", tokens),), SIZE), []) for tokens in (64, 32))
    for holding, full in ((long, 6), (short, 3)):
        hit = pool.lookup(holding.chain, 99)
        pool.adopt(holding, hit.blocks)
        pool.grow(holding, full)
        pool.register(holding, full)
    assert pool.exclusive(long, 6, ()) == (4, 4)  # two more of t, two of its own
    assert pool.exclusive(long, 6, links((Layer("t", 48),), SIZE)) == (4, 3)
    before = pool.free
    pool.drop(long, 6)
    assert pool.free - before == 4


def test_prompts_share_what_has_the_same_layers_before_it() -> None:
    a = (Layer("t", 40), Layer("s", 30))
    longer = (Layer("t", 40), Layer("s", 90))
    moved = (Layer("t", 48), Layer("s", 30))
    assert spans(a)[1].key == spans(longer)[1].key
    assert spans(a)[0].key == spans(moved)[0].key
    assert spans(a)[1].key != spans(moved)[1].key
    assert [(k.first, k.end) for k in links(a, 16)] == [(0, 2), (2, 4)]
    common = [x == y for x, y in zip(chunk_hashes(a, 10), chunk_hashes(longer, 10), strict=False)]
    assert common == [True] * 7
    assert len(chunk_hashes(longer, 10)) == 13
    assert links((Layer("t", 15),), 16) == ()
