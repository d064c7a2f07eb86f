"""What engines say of themselves, in the forms they say it; whatever is missing is unknown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any, Final

from hexgen_vllm import wire
from hexgen_vllm.types import EngineReport, StepCost

# Names of the same metric in different versions of vLLM, newest first.
_RUNNING: Final = ("vllm:num_requests_running",)
_WAITING: Final = ("vllm:num_requests_waiting",)
_KV_USAGE: Final = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
_PREEMPTIONS: Final = ("vllm:num_preemptions_total", "vllm:num_preemptions")
_STEPS: Final = ("vllm:iteration_tokens_total_count",)
_CACHE_INFO: Final = "vllm:cache_config_info"
_WANTED: Final = frozenset((*_RUNNING, *_WAITING, *_KV_USAGE, *_PREEMPTIONS, *_STEPS, _CACHE_INFO))
_LABEL: Final = re.compile(r'\b(\w+)="([^"]*)"')  # \b: a long word is tried once
_SAMPLE: Final = re.compile(r"^(vllm:\w+)(?:\{([^}]*)\})? ([-+.\w]+)", re.M)
_RANK: Final = re.compile(r'\bengine="(\d{1,6})"')
_MOST_RANKS: Final = 1024
_COEFFICIENTS: Final = tuple(f.name for f in fields(StepCost))


@dataclass(frozen=True, slots=True)
class Telemetry:
    """One reading of the telemetry of an engine, or of one of its data-parallel ranks.

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


def from_stats(stats: Mapping[str, Any]) -> tuple[Telemetry, ...]:
    """Read what ``/hexgen/stats`` says, by rank."""
    ranks = stats.get("ranks")
    if not isinstance(ranks, list) or not ranks:
        return (_from_snapshot(stats),)
    return tuple(_from_snapshot(one if isinstance(one, Mapping) else {}) for one in ranks)


def is_ours(stats: Mapping[str, Any]) -> bool:
    """Return whether that is a snapshot of our scheduler, and not what another program says."""
    return isinstance(stats.get("order"), str) and "steps" in stats


def size(stats: Mapping[str, Any]) -> int:
    """Return how many data-parallel ranks there are, by the snapshot of one."""
    return min(_count(stats.get("data_parallel_size")) or 1, _MOST_RANKS)


def _from_snapshot(stats: Mapping[str, Any]) -> Telemetry:
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


def from_metrics(text: str) -> tuple[Telemetry, ...]:
    """Read stock vLLM's Prometheus metrics, by rank; empty when there are none."""
    ranks: dict[int, dict[str, float]] = {}
    caches: dict[int, int] = {}
    for name, labels, value in _SAMPLE.findall(text):
        if name not in _WANTED or (number := _number(value)) is None:
            continue
        found = _RANK.search(labels)
        rank = int(found[1]) if found else 0
        sums = ranks.setdefault(rank, {})
        sums[name] = sums.get(name, 0.0) + number
        if name == _CACHE_INFO:
            caches[rank] = _cache_tokens(labels)
    # vLLM says of each rank what all of them have together, and gives all the same.
    shares = {rank: tokens // len(ranks) for rank, tokens in caches.items()}
    return tuple(_from_samples(ranks[rank], shares.get(rank)) for rank in sorted(ranks))


def _from_samples(sums: Mapping[str, float], kv_tokens: int | None) -> Telemetry:
    report = EngineReport(
        running=_count(_first(sums, _RUNNING)),
        waiting=_count(_first(sums, _WAITING)),
        kv_usage=_share(_first(sums, _KV_USAGE)),
        preemptions=_count(_first(sums, _PREEMPTIONS)),
    )
    return Telemetry(report, kv_tokens=kv_tokens or None, steps=_count(_first(sums, _STEPS)))


def together(readings: Sequence[Telemetry]) -> Telemetry:
    """Return what all ranks do together; what one of them does not say is unknown.

    No step cost follows from theirs: who shares calls out among them is not known here.
    """
    if len(readings) == 1:
        return readings[0]
    parts = [one.report for one in readings]
    usages = [part.kv_usage for part in parts if part.kv_usage is not None]
    report = EngineReport(
        running=_total_of([part.running for part in parts]),
        waiting=_total_of([part.waiting for part in parts]),
        kv_usage=fmean(usages) if usages and len(usages) == len(parts) else None,
        preemptions=_total_of([part.preemptions for part in parts]),
    )
    return Telemetry(
        report,
        max_num_seqs=_total_of([one.max_num_seqs for one in readings]),
        kv_tokens=_total_of([one.kv_tokens for one in readings]),
        max_num_batched_tokens=_total_of([one.max_num_batched_tokens for one in readings]),
        steps=_total_of([one.steps for one in readings]),
    )


def _total_of(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


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


def _cache_tokens(labels: str) -> int:
    """Return the tokens that a KV cache with these labels holds, 0 when they do not say."""
    info = dict(_LABEL.findall(labels))
    try:
        return int(info["num_gpu_blocks"]) * int(info["block_size"])
    except (KeyError, ValueError):
        return 0


def _first(values: Mapping[str, float], names: tuple[str, ...]) -> float | None:
    return next((values[name] for name in names if name in values), None)


def _number(value: object) -> float | None:
    try:
        number = wire.number(value)
    except ValueError:
        return None
    return number if number >= 0 else None


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
