"""The workflows of a trace that a run plays: drawn with a seed, or a stretch as it was recorded."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from typing import Final

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.sim.workloads.trace import read_trace
from hexgen_vllm.sim.workloads.traces.formats import TraceSource
from hexgen_vllm.sim.workloads.traces.lines import files_of
from hexgen_vllm.sim.workloads.traces.model import TraceWorkflow
from hexgen_vllm.sim.workloads.traces.specs import compact, specs_of
from hexgen_vllm.sim.workloads.workload import WorkflowSpec, generator, renamed

_POOL: Final = 2_000  # workflows that are drawn from, of a trace with more
_OURS: Final = "hexgen"
_TEXT2SQL: Final = "text2sql"


def reservoir(
    workflows: Iterable[TraceWorkflow], count: int, rng: random.Random
) -> tuple[list[TraceWorkflow], int]:
    """Return ``count`` of ``workflows``, each as likely as any other, and how many there were.

    They keep their order. Holds no more than ``count`` of them at a time.
    """
    kept: list[tuple[int, TraceWorkflow]] = []
    seen = 0
    for workflow in workflows:
        seen += 1
        if len(kept) < count:
            kept.append((seen, workflow))
            continue
        place = rng.randrange(seen)
        if place < count:
            kept[place] = seen, workflow
    return [workflow for _, workflow in sorted(kept, key=lambda pair: pair[0])], seen


def drawn(source: TraceSource, count: int, seed: int) -> tuple[WorkflowSpec, ...]:
    """Draw ``count`` workflows with replacement, all arriving at 0.

    Each copy has an id and contents of its own, apart from what several workflows share.

    Raises:
        ConfigError: the trace cannot be read, or is wrong.
    """
    pool = _pool(source, max(_POOL, count), _stamp(source))
    rng = generator(seed, "trace")
    kind = pool[0].type if len({spec.type for spec in pool}) == 1 else "trace"
    return tuple(renamed(rng.choice(pool), f"{kind}-{seed}-{index}") for index in range(count))


def as_recorded(source: TraceSource, count: int, seed: int) -> tuple[WorkflowSpec, ...]:
    """Return ``count`` workflows that followed each other, with their arrivals from 0 on.

    Seed 0 has the first ones, each other one those that follow the seed's before it; behind the
    end it begins anew.

    Raises:
        ConfigError: the trace cannot be read, is wrong, too short, or has no arrivals.
    """
    return _stretch(source, count, seed, _stamp(source))


def _stamp(source: TraceSource) -> tuple[object, ...]:
    """Return what changes when the files of a trace do."""
    return tuple(
        (str(path), os.stat(path).st_mtime_ns, os.stat(path).st_size)
        for path in files_of(source.path)
        if path.exists()
    )


@lru_cache(maxsize=4)
def _pool(source: TraceSource, count: int, stamp: tuple[object, ...]) -> tuple[WorkflowSpec, ...]:
    del stamp
    if source.known_format() == _TEXT2SQL:
        return read_trace(source.path)
    found, _ = reservoir(map(compact, source.workflows()), count, generator(0, "pool"))
    return _specs(source, found)


@lru_cache(maxsize=8)
def _stretch(
    source: TraceSource, count: int, seed: int, stamp: tuple[object, ...]
) -> tuple[WorkflowSpec, ...]:
    del stamp
    first = seed * count
    found = list(map(compact, islice(source.workflows(), first, first + count)))
    if len(found) < count:
        total = sum(1 for _ in source.workflows())
        if total < count:
            raise ConfigError(f"{source.path} has {total} workflows, fewer than {count}.")
        first %= total - count + 1
        found = list(map(compact, islice(source.workflows(), first, first + count)))
    times = [workflow.arrived_s for workflow in found]
    if any(at is None for at in times) or len(set(times)) == 1 < count:
        raise ConfigError(f"{source.path} has no arrival times; let workflows be drawn.")
    found.sort(key=lambda workflow: workflow.arrived_s or 0.0)
    begin = found[0].arrived_s or 0.0
    specs = _specs(source, found)
    return tuple(
        replace(spec, arrival_s=(workflow.arrived_s or 0.0) - begin)
        for spec, workflow in zip(specs, found, strict=True)
    )


def _specs(source: TraceSource, workflows: list[TraceWorkflow]) -> tuple[WorkflowSpec, ...]:
    if not workflows:
        raise ConfigError(f"{source.path} holds no workflow.")
    return specs_of(workflows, templates=source.known_format() == _OURS)
