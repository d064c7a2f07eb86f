"""What an engine says of its limits: our telemetry, stock metrics, vLLM's developer page."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
from yarl import URL

from hexgen_vllm.router.engines import telemetry
from hexgen_vllm.types import StepCost
from hexgen_vllm.wire import STATS_PATH, json_object, stats_port

_CACHE: Final = re.compile(r"^vllm:cache_config_info\{([^}]*)\}", re.M)
_LABEL: Final = re.compile(r'\b(\w+)="([^"]*)"')


@dataclass(frozen=True, slots=True)
class Facts:
    """Limits of an engine; ``None`` is unknown.

    Attributes:
        ours: it runs the urgency scheduler.
        max_num_seqs, max_num_batched_tokens, kv_tokens, block_size, prefix_caching: as in
            :class:`hexgen_vllm.sim.engine.sequence.EngineModel`.
    """

    ours: bool = False
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_tokens: int | None = None
    block_size: int | None = None
    prefix_caching: bool | None = None


async def ask(session: aiohttp.ClientSession, url: str) -> Facts:
    """Return what the engine at ``url`` says; whatever it does not say stays unknown."""
    stats = await _stats(session, url)
    metrics = await _get(session, f"{url}/metrics")
    info = json_object(await _get(session, f"{url}/server_info?config_format=json"))
    told = telemetry.together(telemetry.from_stats(stats))
    labels = dict(_LABEL.findall("".join(_CACHE.findall(metrics))))
    return Facts(
        ours="cost" in stats or "ranks" in stats,
        max_num_seqs=told.max_num_seqs or telemetry.scheduling(info)[1],
        max_num_batched_tokens=told.max_num_batched_tokens or telemetry.token_budget(info),
        kv_tokens=told.kv_tokens or telemetry.together(telemetry.from_metrics(metrics)).kv_tokens,
        block_size=_whole(labels.get("block_size")),
        prefix_caching={"True": True, "False": False}.get(labels.get("enable_prefix_caching", "")),
    )


async def is_router(session: aiohttp.ClientSession, url: str) -> bool:
    """Return whether a router answers at ``url``: it lists its workers, and no engine has any."""
    return "workers" in json_object(await _get(session, f"{url}/workers"))


async def fitted(session: aiohttp.ClientSession, url: str) -> tuple[StepCost, float] | None:
    """Return the step cost that our scheduler fitted to its own steps, and its error."""
    stats = await _stats(session, url)
    report = telemetry.together(telemetry.from_stats(stats)).report
    if report.cost is None or report.fit_error is None:
        return None
    return report.cost, report.fit_error


async def _stats(session: aiohttp.ClientSession, url: str) -> Mapping[str, Any]:
    """Return our telemetry, from where the engine process gives it if its server has none."""
    there = URL(url)
    port = stats_port(there.port or 0)
    beside = "" if port is None else str(there.with_scheme("http").with_port(port))
    for base in (url, beside):
        found = json_object(await _get(session, base + STATS_PATH)) if base else {}
        if found:
            return found
    return {}


async def _get(session: aiohttp.ClientSession, url: str) -> str:
    """Return the body of a page, "" when there is none."""
    try:
        async with session.get(url) as answer:
            return await answer.text() if answer.status == 200 else ""
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
        return ""


def _whole(value: object) -> int | None:
    try:
        number = int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        return None
    return number if number > 0 else None
