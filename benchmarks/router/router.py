"""``hexgen-vllm bench router``: what a call costs on its way through the router.

The router, and vllm-router as the peer, share one core before the same two fake engines and get
load in turn; engines and clients have another core. Figures: CPU time per call, time added to the
first byte, events per second, memory with many streams open, events lost or out of place.

Figures are of this machine; leave it alone while they are taken.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.router import router_measure as measure
from benchmarks.router import router_sides as sides
from benchmarks.router.router_engine import FastEngine
from benchmarks.router.router_load import Client
from benchmarks.router.router_measure import Amounts
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.report import results as files
from hexgen_vllm.report.summary import percentile

_ENGINES: Final = 2
_DIRECT: Final = "direct"
_NO_PEER: Final = "vllm-router is not installed, so that there is nothing to compare with."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--peer", metavar="PROGRAM", help="vllm-router (default: that on PATH)")
    parser.add_argument("--repeats", type=int, default=1, help="measurements of each figure")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="multiplies times and numbers of calls"
    )


def main(args: argparse.Namespace) -> int:
    """Measure, print a table, write the JSON file.

    Returns:
        1 when an event was lost or out of place, else 0.

    Raises:
        ConfigError: an argument cannot work, or a router did not start.
    """
    import uvloop

    if args.repeats < 1:
        raise ConfigError("repeats must be at least 1.")
    if not args.scale > 0:
        raise ConfigError("scale must be more than 0.")
    peer = sides.find_peer(args.peer)
    loop = uvloop.new_event_loop()
    try:
        amounts = Amounts().scaled(args.scale)
        measured = loop.run_until_complete(_measure(peer, amounts, args.repeats))
    finally:
        loop.close()
    found = report(measured, None if peer is None else sides.peer_version(peer))
    print(table(found))
    if args.json is not None:
        files.write(args.json, found)
    return int(found["lost_events"] > 0)


async def _measure(
    peer: list[str] | None, amounts: Amounts, repeats: int
) -> dict[str, list[dict[str, float]]]:
    """Return the figures of every side, one entry per repeat."""
    router_core, load_core = sides.cores()
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {load_core})
    engines = [FastEngine() for _ in range(_ENGINES)]
    for engine in engines:
        await engine.start()
    names = [sides.OURS, *([] if peer is None else (sides.ROUND_ROBIN, sides.PROGRAM_MODE))]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (_DIRECT, *names)}
    try:
        for _ in range(repeats):
            found[_DIRECT].append(await _direct(engines, amounts))
            async with _started(names, engines, router_core, peer) as running:
                cpu = await _cpu(running, amounts)
                for side, client in running:
                    figures = await _one(side, client, engines, amounts)
                    found[side.name].append({**cpu[side.name], **figures})
    finally:
        for engine in engines:
            await engine.stop()
        os.sched_setaffinity(0, before)
    return found


async def _direct(engines: list[FastEngine], amounts: Amounts) -> dict[str, float]:
    client = Client(engines[0].port)
    figures = await _first_bytes(client, amounts)
    client.close()
    speed, _, _ = await measure.events_per_s(None, engines[0].port, engines, amounts)
    return {**figures, "events_per_s": speed}


async def _first_bytes(client: Client, amounts: Amounts) -> dict[str, float]:
    figures = {}
    for clients in (1, amounts.clients):
        times = await measure.first_byte_ms(client, amounts, clients)
        for share in (50, 99):
            figures[f"ttft_p{share}_ms_{clients}"] = percentile(times, share / 100.0)
    return figures


@asynccontextmanager
async def _started(
    names: Sequence[str], engines: list[FastEngine], core: int, peer: list[str] | None
) -> AsyncIterator[list[tuple[sides.Side, Client]]]:
    """Start one router after the other on the same core; end all of them."""
    running: list[tuple[sides.Side, Client]] = []
    try:
        for name in names:
            side = sides.start(name, [e.url for e in engines], core, peer)
            running.append((side, Client(side.port, side.says)))
            await measure.ready(side)
        yield running
    finally:
        for side, client in running:
            client.close()
            side.stop()


async def _cpu(
    running: list[tuple[sides.Side, Client]], amounts: Amounts
) -> dict[str, dict[str, float]]:
    """Return the CPU figures of every side, measured in turns."""
    await measure.cpu_ms(running, 0.5, stream=False)  # warm up
    found: dict[str, dict[str, float]] = {side.name: {} for side, _ in running}
    for key, stream in (("json", False), ("sse", True)):
        times = await measure.cpu_ms(running, amounts.cpu_s, stream=stream)
        for (side, _), ms in zip(running, times, strict=True):
            found[side.name][f"cpu_ms_{key}"] = ms
    return found


async def _one(
    side: sides.Side, client: Client, engines: list[FastEngine], amounts: Amounts
) -> dict[str, float]:
    figures = await _first_bytes(client, amounts)
    client.close()
    if side.name == sides.PROGRAM_MODE:  # it holds back most of hundreds of streams
        return {**figures, "lost_events": client.lost}
    speed, busy, lost = await measure.events_per_s(side, side.port, engines, amounts)
    rss, lost_open = await measure.open_streams(side, engines, amounts)
    return {
        **figures,
        "events_per_s": speed,
        "busy_at_full_speed": busy,
        "events_per_cpu_s": speed / max(busy, 0.01),
        "rss_mib_streams": rss,
        "lost_events": client.lost + lost + lost_open,
    }


def report(
    measured: dict[str, list[dict[str, float]]], peer_version: str | None = None
) -> dict[str, Any]:
    """Return ratios, the medians they come from, and every measurement.

    Ratios are to the peer in round_robin, which does the least; those to its program mode have
    names that end in ``_program``.
    """
    middle = {
        name: {key: round(median(run[key] for run in runs), 4) for key in runs[0]}
        for name, runs in measured.items()
    }
    ours, direct = middle[sides.OURS], middle[_DIRECT]
    found: dict[str, Any] = {}
    for name, ending in ((sides.ROUND_ROBIN, ""), (sides.PROGRAM_MODE, "_program")):
        peer = middle.get(name)
        for key in ("sse", "json"):
            figure = f"cpu_ms_{key}"
            found[f"cpu_ratio_{key}{ending}"] = peer and round(ours[figure] / peer[figure], 3)
    for share in (50, 99):
        for clients, ending in ((1, ""), (Amounts().clients, f"_{Amounts().clients}_clients")):
            key = f"ttft_p{share}_ms_{clients}"
            found[f"added_ttft_p{share}_ms{ending}"] = round(ours[key] - direct[key], 3)
    peer = middle.get(sides.ROUND_ROBIN)
    for key in ("events_per_s", "events_per_cpu_s"):
        found[f"{key}_ratio"] = peer and round(ours[key] / peer[key], 3)
    found["rss_mib_2000_streams"] = ours["rss_mib_streams"]
    found["lost_events"] = int(sum(run["lost_events"] for run in measured[sides.OURS]))
    found["sides"], found["runs"] = middle, measured
    found["environment"] = {
        "peer": peer_version,
        "compiled": sides.compiled(),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
    }
    if sides.ROUND_ROBIN not in middle:
        found["note"] = _NO_PEER
    return found


_ROWS: Final = (
    ("cpu_ms_json", "CPU per JSON call, ms"),
    ("cpu_ms_sse", "CPU per 50-event call, ms"),
    ("ttft_p50_ms_1", "TTFT P50, 1 client, ms"),
    ("ttft_p99_ms_1", "TTFT P99, 1 client, ms"),
    ("ttft_p50_ms_64", "TTFT P50, 64 clients, ms"),
    ("ttft_p99_ms_64", "TTFT P99, 64 clients, ms"),
    ("events_per_s", "events per second"),
    ("busy_at_full_speed", "  share of its core in use"),
    ("events_per_cpu_s", "  events per second of CPU"),
    ("rss_mib_streams", "RSS, all streams open, MiB"),
    ("lost_events", "lost or moved events"),
)


def table(found: dict[str, Any]) -> str:
    """Return the figures as text."""
    names = list(found["sides"])
    lines = [f"{'':28}" + "".join(f"{name:>25}" for name in names)]
    for key, title in _ROWS:
        cells = [found["sides"][name].get(key) for name in names]
        shown = ["-" if cell is None else f"{cell:,.3f}".rstrip("0").rstrip(".") for cell in cells]
        lines.append(f"{title:28}" + "".join(f"{cell:>25}" for cell in shown))
    ratios = [f"{key} {value}" for key, value in found.items() if key.startswith("cpu_ratio")]
    plain = "plain Python; pip install . compiles it, and make bench-router measures that"
    kind = "compiled" if found["environment"]["compiled"] else plain
    lines.append(f"{sides.OURS} is {kind}.")
    return "\n".join([*lines, found.get("note") or "  ".join(ratios)])
