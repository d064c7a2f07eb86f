"""A measured engine as an entry of the simulator's ``fleet``, and as a file of entries."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import yaml

from hexgen_vllm.calibrate.facts import Facts
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.types import StepCost

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
    entries, known_s = _read(path)
    fleet = [*(old for old in entries if old.get("name") != entry["name"]), entry]
    simulation = {"router_latency_s": round(max(call_latency_s, known_s), 5)}
    text = yaml.safe_dump({"fleet": fleet, "simulation": simulation}, sort_keys=False)
    path.write_text(text, encoding="utf-8")


def _read(path: Path) -> tuple[list[dict[str, Any]], float]:
    """Return the engines in ``path``, none when it does not exist, and the latency there."""
    if not path.exists():
        return [], 0.0
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}.") from None
    keys = set(data) if isinstance(data, dict) else set()
    fleet = data["fleet"] if "fleet" in keys and keys <= {"fleet", "simulation"} else None
    if not isinstance(fleet, list) or not all(isinstance(entry, dict) for entry in fleet):
        raise ConfigError(f"{path} must hold nothing but a fleet with a list of engines.")
    return fleet, float((data.get("simulation") or {}).get("router_latency_s", 0.0))
