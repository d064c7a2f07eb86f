"""What the router says of an engine: never its address."""

from __future__ import annotations

from typing import Any

from hexgen_vllm.router.context import Context
from hexgen_vllm.router.fleet import Engine
from hexgen_vllm.types import EngineState


def worker_view(context: Context, engine: Engine) -> dict[str, Any]:
    """Return an engine as ``/workers`` shows it."""
    load = context.service.coordinator.engines.get(engine.name)
    spec = engine.spec
    return {
        "name": engine.name,
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
