"""What engines say of themselves, in the forms they say it; whatever is missing is unknown."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from hexgen_vllm.types import EngineReport, StepCost

# Names of the same metric in different versions of vLLM, newest first.
_RUNNING: Final = ("vllm:num_requests_running",)
_WAITING: Final = ("vllm:num_requests_waiting",)
_KV_USAGE: Final = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
_PREEMPTIONS: Final = ("vllm:num_preemptions_total", "vllm:num_preemptions")
_STEPS: Final = ("vllm:iteration_tokens_total_count",)
_CACHE_INFO: Final = re.compile(r"^vllm:cache_config_info\{([^}]*)\}", re.M)
_LABEL: Final = re.compile(r'(\w+)="([^"]*)"')
_SAMPLE: Final = re.compile(r"^(vllm:\w+)(?:\{[^}]*\})? ([-+.\w]+)", re.M)
_COEFFICIENTS: Final = tuple(f.name for f in fields(StepCost))


@dataclass(frozen=True, slots=True)
class Telemetry:
    """One reading of an engine's telemetry.

    Attributes:
        report: what the coordinator takes in.
        max_num_seqs: sequences the engine runs at once.
        kv_tokens: tokens its KV cache holds.
        max_num_batched_tokens: tokens of a step.
        steps: steps since it started; a smaller number than before means that it restarted.
    """

    report: EngineReport
    max_num_seqs: int | None = None
    kv_tokens: int | None = None
    max_num_batched_tokens: int | None = None
    steps: int | None = None


def from_stats(stats: Mapping[str, Any]) -> Telemetry:
    """Read a ``/hexgen/stats`` snapshot."""
    report = EngineReport(
        cost=_cost(stats.get("cost")),
        fit_error=_number(stats.get("fit_error")),
        running=_count(stats.get("running")),
        waiting=_count(stats.get("waiting")),
        kv_usage=_share(stats.get("kv_usage")),
        preemptions=_total(stats.get("preemptions")),
        prefill_share=_share(stats.get("prefill_share")),
    )
    return Telemetry(
        report,
        max_num_seqs=_count(stats.get("max_num_seqs")) or None,
        kv_tokens=_count(stats.get("kv_tokens")) or None,
        max_num_batched_tokens=_count(stats.get("max_num_batched_tokens")) or None,
        steps=_count(stats.get("steps")),
    )


def from_metrics(text: str) -> Telemetry:
    """Read stock vLLM's Prometheus metrics; samples of several engine ranks are added up."""
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for name, value in _SAMPLE.findall(text):
        number = _number(value)
        if number is not None:
            sums[name] = sums.get(name, 0.0) + number
            counts[name] = counts.get(name, 0) + 1
    usage = next((sums[n] / counts[n] for n in _KV_USAGE if n in sums), None)
    report = EngineReport(
        running=_count(_first(sums, _RUNNING)),
        waiting=_count(_first(sums, _WAITING)),
        kv_usage=_share(usage),
        preemptions=_count(_first(sums, _PREEMPTIONS)),
    )
    steps = _count(_first(sums, _STEPS))
    return Telemetry(report, kv_tokens=_kv_tokens(text), steps=steps)


def scheduling(server_info: object) -> tuple[str | None, int | None]:
    """Read scheduling policy and sequence slots from vLLM's ``/server_info``."""
    found = _scheduler_config(server_info)
    policy = found.get("policy")
    return policy if isinstance(policy, str) else None, _count(found.get("max_num_seqs")) or None


def token_budget(server_info: object) -> int | None:
    """Read the tokens of a step from vLLM's ``/server_info``."""
    return _count(_scheduler_config(server_info).get("max_num_batched_tokens")) or None


def _scheduler_config(server_info: object) -> Mapping[str, Any]:
    config = server_info.get("vllm_config") if isinstance(server_info, dict) else None
    found = config.get("scheduler_config") if isinstance(config, dict) else None
    return found if isinstance(found, dict) else {}


def _kv_tokens(text: str) -> int | None:
    tokens = 0
    for labels in _CACHE_INFO.findall(text):
        info = dict(_LABEL.findall(labels))
        try:
            tokens += int(info["num_gpu_blocks"]) * int(info["block_size"])
        except (KeyError, ValueError):
            return None
    return tokens or None


def _first(values: Mapping[str, float], names: tuple[str, ...]) -> float | None:
    return next((values[name] for name in names if name in values), None)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _count(value: object) -> int | None:
    number = _number(value)
    return None if number is None else int(number)


def _share(value: object) -> float | None:
    number = _number(value)
    return None if number is None else min(number, 1.0)


def _total(value: object) -> int | None:
    """Return a count that may be split by cause."""
    if not isinstance(value, Mapping):
        return _count(value)
    parts = [_count(part) for part in value.values()]
    known = [part for part in parts if part is not None]
    return sum(known) if known else None


def _cost(value: object) -> StepCost | None:
    if not isinstance(value, Mapping):
        return None
    numbers = [_number(value.get(name)) for name in _COEFFICIENTS]
    known = [number for number in numbers if number is not None]
    return StepCost(*known) if len(known) == len(numbers) else None
