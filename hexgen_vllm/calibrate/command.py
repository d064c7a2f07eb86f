"""``hexgen-vllm calibrate``: measures an engine in under a minute.

It sends a small designed set of calls and times the answers. Of an engine that runs our scheduler
it takes the step cost that the engine has then fitted to its own steps; of any other one it fits
the timings. The result is an entry of the simulator's ``fleet``. Calibrate an idle engine.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from hexgen_vllm.bench.load_client import find_model
from hexgen_vllm.calibrate import entry, facts
from hexgen_vllm.calibrate.entry import to_calibration
from hexgen_vllm.calibrate.fit import Fit, fit, overhead_s
from hexgen_vllm.calibrate.measure import MAX_PROMPT, Measurement, design
from hexgen_vllm.clock import SystemClock
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.option import add_arguments as add_options
from hexgen_vllm.option import check, from_mapping, given, option
from hexgen_vllm.report import results

_BIG_ERROR: Final = 0.2
_CALL_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True)
class CalibrateOptions:
    """What to measure, and what the engine does not say itself."""

    name: str = option("", "name of the engine in the fleet; empty is its host and port")
    model: str | None = option(None, "served model name; none is the first one")
    budget_s: float = option(40.0, "no probe starts later than this, seconds", least=1.0)
    max_num_seqs: int | None = option(None, "sequences of a batch, if it does not say", least=1)
    max_num_batched_tokens: int | None = option(
        None, "tokens of a step, if it does not say", least=1
    )
    kv_tokens: int | None = option(None, "tokens of its KV cache, if it does not say", least=1)
    api_key: str | None = option(None, "bearer token for the engine")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Calibration:
    """What was found out about an engine.

    Attributes:
        fleet_entry: what goes under ``fleet`` of a scenario.
        fit: step cost and its error.
        source: ``steps`` of the engine itself, or ``timings`` of answers.
        timings_fit: the fit of the timings, for comparison.
        call_latency_s: time of a call outside the engine's steps, with a router in between: what
            the engine's server adds, the round trip, and one more for the router.
        assumed: limits that the engine does not say and that were assumed.
        limits: limits of the engine.
    """

    fleet_entry: dict[str, Any]
    fit: Fit
    source: str
    timings_fit: Fit
    call_latency_s: float
    assumed: list[str]
    limits: facts.Facts

    def row(self) -> dict[str, Any]:
        """Return everything as one JSON object."""
        return {
            "engine": self.fleet_entry,
            "source": self.source,
            "fit_error": self.fit.error,
            "timings_cost": asdict(self.timings_fit.cost),
            "timings_error": self.timings_fit.error,
            "call_latency_s": self.call_latency_s,
            "assumed": self.assumed,
            "vllm_router": to_calibration(
                self.fit.cost, self.limits.max_num_batched_tokens or 2048
            ),
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hexgen-vllm calibrate``."""
    add = parser.add_argument
    add("--url", required=True, help="base URL of the engine, not of a router")
    add_options(parser, CalibrateOptions)
    add("--fleet", type=Path, metavar="FLEET.yaml", help="add the engine to this fleet file")
    add("--json", type=Path, metavar="OUT", help="write everything here")


def main(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        ConfigError: an option is wrong, or the engine cannot be measured.
    """
    for path in (args.json, args.fleet):
        results.check_writable(path)
    if args.fleet:
        entry.read(args.fleet)  # before the engine is measured for nothing
    options = from_mapping(CalibrateOptions, given(args, CalibrateOptions))
    found = asyncio.run(calibrate(args.url, options))
    print(calibration_text(found))
    if args.json:
        results.write(args.json, found.row())
    if args.fleet:
        entry.write(args.fleet, found.fleet_entry, found.call_latency_s)
    return 0


async def calibrate(url: str, options: CalibrateOptions) -> Calibration:
    """Measure the engine at ``url``.

    Raises:
        ConfigError: it cannot be measured.
    """
    url = url.rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"url must start with http:// or https://, not {url!r}.")
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    timeout = aiohttp.ClientTimeout(total=_CALL_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as http:
        return await _measured(http, url, options)


async def _measured(
    http: aiohttp.ClientSession, url: str, options: CalibrateOptions
) -> Calibration:
    if await facts.is_router(http, url):
        raise ConfigError(f"{url} is a router; give the URL of one engine.")
    model = await find_model(http, url, options.model)
    said = facts.Facts(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        kv_tokens=options.kv_tokens,
    )
    limits, assumed = entry.complete(await facts.ask(http, url), said)
    room = min(model.max_tokens or MAX_PROMPT, limits.kv_tokens or MAX_PROMPT)
    probes = design(room, limits.max_num_seqs or 1)
    measurement = Measurement(http, url, model.name, SystemClock(), uuid.uuid4().hex)
    timings = await measurement.run(probes, options.budget_s, _progress)
    chunk = None if "max_num_batched_tokens" in assumed else limits.max_num_batched_tokens
    outside = fit(timings.prefills, timings.decodes, chunk)
    inside = await facts.fitted(http, url) if limits.ours else None
    best = Fit(*inside) if inside is not None else outside
    name = options.name or urlsplit(url).netloc
    source = "steps" if inside is not None else "timings"
    found = entry.fleet_entry(name, best.cost, limits)
    beyond_s = overhead_s(timings.prefills, best.cost, limits.max_num_batched_tokens or MAX_PROMPT)
    latency_s = beyond_s + 2 * measurement.round_trip_s
    return Calibration(found, best, source, outside, latency_s, assumed, limits)


def calibration_text(found: Calibration) -> str:
    """Return what was found out as text."""
    costs = {f"fit ({found.source})": found.fit}
    if found.source == "steps":
        costs["fit (timings)"] = found.timings_fit
    lines = [f"engine {found.fleet_entry['name']}"]
    for title, one in costs.items():
        values = "  ".join(f"{key} {value:.3g}" for key, value in asdict(one.cost).items())
        lines.append(f"{title}: {values}  error {one.error:.1%}")
    lines.append(f"a call takes {1e3 * found.call_latency_s:.1f} ms outside the engine's steps")
    limits = [f"{key} {value}" for key, value in found.fleet_entry.items() if key != "cost"]
    lines.append("limits: " + ", ".join(limits[1:]))
    if found.assumed:
        lines.append(f"assumed, because it does not say: {', '.join(found.assumed)}")
    if found.fit.error > _BIG_ERROR:
        lines.append("the fit is poor: was the engine idle?")
    return "\n".join(lines)


def _progress(done: int, count: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == count else ""
        print(f"\rprobe {done}/{count}", end=end, file=sys.stderr, flush=True)
