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


def write(path: Path, entry: dict[str, Any]) -> None:
    """Write ``entry`` into the fleet file ``path``; an entry of the same name is replaced.

    Raises:
        ConfigError: the file exists and holds something else than a fleet.
    """
    entries = [old for old in _read(path) if old.get("name") != entry["name"]]
    text = yaml.safe_dump({"fleet": [*entries, entry]}, sort_keys=False)
    path.write_text(text, encoding="utf-8")


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}.") from None
    fleet = data.get("fleet") if isinstance(data, dict) and set(data) == {"fleet"} else None
    if not isinstance(fleet, list) or not all(isinstance(entry, dict) for entry in fleet):
        raise ConfigError(f"{path} must hold nothing but a fleet with a list of engines.")
    return fleet
