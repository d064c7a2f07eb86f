"""What the router says of an engine: never its address."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from hexgen_vllm.router.context import Context
from hexgen_vllm.router.fleet import Engine
from hexgen_vllm.types import EngineState

_SUMMED: Final = ("max_num_seqs", "kv_tokens", "load")


def worker_view(context: Context, engine: Engine) -> dict[str, Any]:
    """Return an engine as ``/workers`` shows it; limits and load are those of all its ranks."""
    ranks = [target_view(context, engine, target) for target in engine.targets]
    sums = {name: _sum(rank[name] for rank in ranks) for name in _SUMMED}
    return {**ranks[0], "name": engine.name, **sums, "data_parallel_size": len(ranks)}


def target_view(context: Context, engine: Engine, target: str) -> dict[str, Any]:
    """Return what is known of an engine, or of one of its ranks."""
    load = context.service.coordinator.engines.get(target)
    spec = engine.targets[target]
    return {
        "name": target,
        "state": engine.state.value,
        "is_healthy": engine.state is not EngineState.DOWN,
        "reason": engine.why,
        "kind": None if spec is None else spec.kind.value,
        "models": sorted(spec.models) if spec is not None else [],
        "max_num_seqs": None if spec is None else spec.max_num_seqs,
        "kv_tokens": None if spec is None else spec.kv_tokens,
        "max_model_len": None if spec is None else spec.max_model_len,
        "load": 0 if load is None else len(load.in_flight),
    }


def _sum(values: Iterable[int | None]) -> int | None:
    found = list(values)
    known = [value for value in found if value is not None]
    return sum(known) if len(known) == len(found) else None
