"""``hexgen-vllm bench soak``: the router for a long time, with clients that leave and engines
that die.

Whole answers and streams, some of which their clients abandon, go through a router process to
three fake engines; every few seconds one of them dies and comes back. Each answer is compared
byte for byte. It fails if memory grows, if anything is open in the router when the load has
ended, if a call came to no end that its client saw, or if the book of calls does not balance.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections import Counter
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Final

from benchmarks.router import router_engine
from benchmarks.router.router_engine import FastEngine
from benchmarks.router.router_load import (
    STAGES,
    Call,
    Client,
)
from hexgen_vllm.errors import ConfigError

_ENGINES: Final = 3
_SETTLE_S: Final = 15.0
_CHURN_S: Final = (3.0, 10.0)  # between two deaths
_DOWN_S: Final = (0.2, 3.0)
_IMPATIENT: Final = 0.1  # share of calls whose client leaves
_MUST_BE_0: Final = (
    "open_calls", "tries", "held", "waiting", "in_flight", "open_workflows", "engine_connections",
)  # fmt: skip
Sample = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("--minutes", type=float, default=30.0, help="length of the load")
    parser.add_argument("--rate", type=float, default=40.0, help="calls per second")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two samples")
    parser.add_argument(
        "--max-growth-mib",
        type=float,
        default=4.0,
        help="most by which memory in the last quarter may exceed that in the second",
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and samples")


def main(args: argparse.Namespace) -> int:
    """Run the soak, print what was seen, write the JSON file.

    Returns:
        1 when something is wrong, else 0.

    Raises:
        ConfigError: an argument is not more than 0.
    """
    import uvloop

    for name in ("minutes", "rate", "every", "max_growth_mib"):
        if not getattr(args, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be more than 0.")
    loop = uvloop.new_event_loop()
    try:
        found = loop.run_until_complete(_soak(args))
    finally:
        loop.close()
    found["wrong"] = wrong = verdict(found, args.max_growth_mib)
    print(text(found))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(wrong))


class _Judge(Client):
    """Sorts calls by their end.

    Attributes:
        seen: number of calls by what their clients saw; ``wrong bytes`` and ``dropped`` are bad.
    """

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.seen: Counter[str] = Counter()
        self.port = port
        self.left: set[int] = set()

    def judge(self, call: Call) -> None:
        """Count ``call``."""
        self.seen[self._end(call)] += 1

    def _end(self, call: Call) -> str:
        body = b"".join(call.body)
        if call.status == 200 and not call.wrong():
            return "answered"
        if call.seed in self.left:
            return "left"
        if call.status >= 400:
            return "refused" if b'"error"' in body else "wrong bytes"
        if not call.status or not call.stream:
            return "dropped"
        sent, _, error = body.rpartition(b'data: {"error"')
        whole = b"".join(router_engine.events(call.tokens)).startswith(sent)
        return "error event" if error and whole else "wrong bytes"


class _Router:
    """The router process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.samples: list[Sample] = []

    async def line(self) -> str:
        if self._process.stdout is None:
            raise RuntimeError("it has no output")
        found = (await self._process.stdout.readline()).decode()
        if not found:
            raise ConfigError("the router process ended.")
        return found

    async def sample(self, at_s: float) -> Sample:
        if self._process.stdin is None:
            raise RuntimeError("it has no input")
        self._process.stdin.write(b"\n")
        found: Sample = {"at_s": round(at_s, 1), **json.loads(await self.line())}
        self.samples.append(found)
        return found

    async def stop(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        await self._process.wait()


async def _soak(args: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(args.seed)
    engines = [FastEngine() for _ in range(_ENGINES)]
    for engine in engines:
        await engine.start()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.router.soak_router", *(e.url for e in engines),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    router = _Router(process)
    client = _Judge(int(await router.line()))
    try:
        before = await _when(router, 0.0, lambda s: s["engines_up"] == _ENGINES)
        deaths = await _load(args, rng, engines, client, router)
        client.close()
        after = await _when(router, args.minutes * 60.0, lambda s: not left_over(before, s))
    finally:
        await router.stop()
        for engine in engines:
            await engine.stop()
    return {
        "seen": dict(client.seen),
        "deaths": deaths,
        "asked": client.calls,
        "before": before,
        "after": after,
        "rss_mib": _quarters([s["rss_mib"] for s in router.samples]),
        "minutes": args.minutes,
        "samples": router.samples,
    }


async def _when(router: _Router, at_s: float, true: Any) -> Sample:
    """Return the first sample of which ``true`` is, or the last one before patience ends."""
    give_up = perf_counter() + _SETTLE_S
    while not true(found := await router.sample(at_s)) and perf_counter() < give_up:
        await asyncio.sleep(0.25)
    return found


async def _load(
    args: argparse.Namespace,
    rng: random.Random,
    engines: list[FastEngine],
    client: _Judge,
    router: _Router,
) -> int:
    """Call, and let engines die, until the time is over; return the number of deaths."""
    began, calls = perf_counter(), set[asyncio.Task[None]]()
    churn = asyncio.ensure_future(_churn(engines, rng))
    sample_at, workflows = 0.0, 0
    while (now := perf_counter() - began) < args.minutes * 60.0:
        task = asyncio.ensure_future(_workflow(client, rng, workflows))
        workflows += 1
        calls.add(task)
        task.add_done_callback(calls.discard)
        if now >= sample_at:
            sample_at = now + args.every
            await router.sample(now)
        await asyncio.sleep(rng.expovariate(args.rate / STAGES))
    churn.cancel()
    if calls:
        await asyncio.wait(calls)
    (deaths,) = await asyncio.gather(churn)
    return deaths


async def _workflow(client: _Judge, rng: random.Random, number: int) -> None:
    """Make the calls of a workflow one after the other, and say at last that it is over."""
    for seed in range(STAGES * number, STAGES * (number + 1)):
        stream, tokens = rng.random() < 0.5, rng.randint(1, 40)
        if rng.random() < _IMPATIENT:
            client.left.add(seed)
            patience_s = rng.uniform(0.0, 0.2)
            await client.call(tokens, stream=stream, seed=seed, patience_s=patience_s)
            client.left.discard(seed)
        else:
            await client.call(tokens, stream=stream, seed=seed)
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    writer.write(
        f"POST /finish_session?session_id=w{number} HTTP/1.1\r\nHost: a\r\n"
        "Content-Length: 0\r\nConnection: close\r\n\r\n".encode()
    )
    await reader.read()
    writer.close()


async def _churn(engines: list[FastEngine], rng: random.Random) -> int:
    """Kill engines and start them again until cancelled; return how often."""
    deaths = 0
    down: FastEngine | None = None
    try:
        while True:
            await asyncio.sleep(rng.uniform(*_CHURN_S))
            down = rng.choice(engines)
            await down.stop()
            deaths += 1
            await asyncio.sleep(rng.uniform(*_DOWN_S))
            await down.start()
            down = None
    except asyncio.CancelledError:
        if down is not None:
            await down.start()
        return deaths


def left_over(before: Sample, after: Sample) -> list[str]:
    """Return what is open in ``after`` that should not be, in words."""
    found = [f"{name} is {after[name]}" for name in _MUST_BE_0 if after[name]]
    for name in ("tasks", "files"):
        if after[name] > before[name]:
            found.append(f"{name} were {before[name]} and are {after[name]}")
    return found


def verdict(found: dict[str, Any], max_growth_mib: float) -> list[str]:
    """Return what is wrong, in words."""
    after, seen = found["after"], found["seen"]
    wrong = left_over(found["before"], after)
    wrong += [f"{seen[bad]} calls: {bad}" for bad in ("wrong bytes", "dropped") if seen.get(bad)]
    if sum(seen.values()) != found["asked"]:
        wrong.append(f"{found['asked']} calls asked, {sum(seen.values())} came to an end")
    if after["arrived"] != after["answered"] + sum(after["failed"].values()):
        wrong.append("the book of calls does not balance")
    quarters = found["rss_mib"]
    if quarters["growth"] > max_growth_mib:
        wrong.append(f"memory grew by {quarters['growth']} MiB")
    return wrong


def _quarters(rss_mib: list[float]) -> dict[str, float]:
    """Return medians of the second and the last quarter, and the growth between them, MiB."""
    size = max(len(rss_mib) // 4, 1)
    second, last = median(rss_mib[size : 2 * size] or rss_mib), median(rss_mib[-size:])
    return {
        "second_quarter": second,
        "last_quarter": last,
        "most": max(rss_mib),
        "growth": round(last - second, 2),
    }


def text(found: dict[str, Any]) -> str:
    """Return the figures as text."""
    after, rss = found["after"], found["rss_mib"]
    seen = ", ".join(f"{n} {what}" for what, n in sorted(found["seen"].items()))
    lines = [
        f"{found['asked']} calls in {found['minutes']:g} minutes: {seen}",
        f"{found['deaths']} deaths of engines, {after['retries']} retries",
        f"RSS {rss['second_quarter']} MiB in the second quarter, {rss['last_quarter']} MiB in the "
        f"last, {rss['most']} MiB at most",
        f"at the end: {after['tasks']} tasks, {after['files']} open files "
        f"(before: {found['before']['tasks']}, {found['before']['files']}), "
        f"{after['open_workflows']} open workflows",
        *(f"WRONG: {one}" for one in found["wrong"]),
    ]
    return "\n".join(lines)
