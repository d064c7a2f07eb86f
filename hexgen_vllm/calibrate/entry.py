"""A measured engine as an entry of the simulator's ``fleet``, as a file, for vllm-router."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import yaml

from hexgen_vllm import yaml_files
from hexgen_vllm.calibrate.facts import Facts
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.types import StepCost

PREFILL: Final = "prefill_cost_model"
DECODE: Final = "decode_throughput_model"
_PREFILL_KEYS: Final = (
    "intercept_seconds",
    "linear_seconds_per_1k_tokens",
    "quadratic_seconds_per_1k_tokens_squared",
)
_ALPHA: Final = "decode_throughput_alpha"
_DECODE_KEYS: Final = (
    "fixed_step_seconds",
    "batch_step_seconds_per_request",
    "context_step_seconds_per_token",
)
_TYPICAL_BATCH: Final = 16
_TYPICAL_CONTEXT: Final = 4096

_LIMITS: Final = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "kv_tokens",
    "block_size",
    "prefix_caching",
)
_ASSUMED: Final = Facts(False, 256, 2048, 400_000, 16, True)
"""What vLLM does by default, for an engine that does not say."""


def complete(facts: Facts, given: Facts) -> tuple[Facts, list[str]]:
    """Return ``facts`` without gaps, and the names of limits that had to be assumed.

    Args:
        facts: what the engine says.
        given: what the command line says; it wins.
    """
    assumed, values = [], {}
    for name in _LIMITS:
        value = getattr(given, name)
        if value is None:
            value = getattr(facts, name)
        if value is None:
            value = getattr(_ASSUMED, name)
            assumed.append(name)
        values[name] = value
    return replace(facts, **values), assumed


def fleet_entry(name: str, cost: StepCost, facts: Facts) -> dict[str, Any]:
    """Return what goes under ``fleet`` in a scenario; seconds and tokens."""
    rounded = {key: float(f"{value:.6g}") for key, value in asdict(cost).items()}
    return {"name": name, **{n: getattr(facts, n) for n in _LIMITS}, "cost": rounded}


def write(path: Path, entry: dict[str, Any], call_latency_s: float) -> None:
    """Write ``entry`` into the fleet file ``path``; an entry of the same name is replaced.

    The simulator's ``router_latency_s`` goes beside it: the largest one of all engines.

    Raises:
        ConfigError: the file exists and holds something else than a fleet.
    """
    entries, known_s = read(path)
    fleet = [*(old for old in entries if old.get("name") != entry["name"]), entry]
    simulation = {"router_latency_s": round(max(call_latency_s, known_s), 5)}
    text = yaml.safe_dump({"fleet": fleet, "simulation": simulation}, sort_keys=False)
    path.write_text(text, encoding="utf-8")


def read(path: Path) -> tuple[list[dict[str, Any]], float]:
    """Return the engines in ``path``, none when it does not exist, and the latency there.

    Raises:
        ConfigError: the file exists and holds something else than a fleet.
    """
    if not path.exists():
        return [], 0.0
    source = yaml_files.read(path)
    data = source.value
    keys = set(data) if isinstance(data, dict) else set()
    fleet = data["fleet"] if "fleet" in keys and keys <= {"fleet", "simulation"} else None
    if not isinstance(fleet, list) or not all(isinstance(entry, dict) for entry in fleet):
        raise ConfigError(f"{path} must hold nothing but a fleet with a list of engines.")
    latency = ("simulation", "router_latency_s")
    return fleet, 0.0 if source.at(latency) is None else source.typed(float, latency)


def to_calibration(cost: StepCost, chunk: int = 2048) -> dict[str, dict[str, float]]:
    """Return ``cost`` in the seven coefficients of vllm-router's program scheduling.

    vllm-router calibrates one model for a whole fleet; here every device has its own. It knows two
    formulas, in seconds, tokens n counted in thousands::

        prefill(n)       = intercept + linear * n + quadratic * n^2
        decode step(b,c) = fixed + batch * b + context * c

    A :class:`~hexgen_vllm.types.StepCost` says the same with a prompt computed in one step.
    ``decode_throughput_alpha``, the share of decode throughput that is left while a prompt is
    computed, follows from the rest.

    Args:
        cost: of one device.
        chunk: prompt tokens of a step, for ``decode_throughput_alpha`` only.
    """
    context = _TYPICAL_BATCH * _TYPICAL_CONTEXT
    alone = cost.step_s(_TYPICAL_BATCH, context)
    mixed = cost.step_s(_TYPICAL_BATCH, context, chunk, chunk * chunk / 2)
    prefill = (cost.c0 + cost.p0, 1e3 * cost.p1, 1e6 * cost.p2 / 2)
    return {
        PREFILL: {
            **dict(zip(_PREFILL_KEYS, prefill, strict=True)),
            _ALPHA: alone / mixed if mixed > 0 else 1.0,
        },
        DECODE: dict(zip(_DECODE_KEYS, (cost.c0, cost.c1, cost.c2), strict=True)),
    }
