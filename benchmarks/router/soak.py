"""``hexgen-vllm bench soak``: the router for a long time, with clients that leave or do not read,
engines that die, and descriptors that run out.

Whole answers and streams go through a router process to three fake engines. Some clients abandon
their calls; some stop reading for a while, some for good. Every few seconds an engine dies and
comes back; now and then the router has no file descriptor left. Each answer is compared byte for
byte. It fails if memory grows, if anything is open in the router when the load has ended, if a
call came to no end that its client saw, if the book of calls does not balance, or if the router
took an engine out that was there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from math import inf
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Final

from benchmarks.router import router_engine
from benchmarks.router.router_engine import FastEngine
from benchmarks.router.router_load import STAGES, Call, Client
from benchmarks.router.soak_router import STALL_S
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.report import results as files

_ENGINES: Final = 3
_SETTLE_S: Final = 15.0
_CHURN_S: Final = (3.0, 10.0)  # between two deaths
_DOWN_S: Final = (0.2, 3.0)
_IMPATIENT: Final = 0.1  # share of calls whose client leaves
_SLOW_EVERY_S: Final = (2.0, 6.0)  # between two clients that stop reading
_SLOW_TOKENS: Final = (500, 1500)
_PAUSE_S: Final = (1.0, 4.0)  # less than the router bears
_STUCK: Final = 0.4  # share of clients that stop reading for good,
_STUCK_S: Final = 4 * STALL_S  # which is much more than it bears,
_STUCK_TOKENS: Final = 20_000  # with answers that no buffer on the way can hold
_SLOW_PATIENCE_S: Final = 120.0
_SHORT_EVERY_S: Final = (15.0, 45.0)  # between two shortages
_SHORT_S: Final = (0.5, 3.0)
_NOTICED_S: Final = 5.0  # after its return an engine may still be found dead
_MUST_BE_0: Final = (
    "open_calls", "tries", "held", "waiting", "in_flight", "open_workflows", "engine_connections",
)  # fmt: skip
Sample = dict[str, Any]
Span = tuple[float, float]
"""From when to when, seconds of the system's monotonic clock."""


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
        files.write(args.json, found)
    return int(bool(wrong))


class _Judge(Client):
    """Sorts calls by their end.

    Attributes:
        seen: number of calls by what their clients saw; ``wrong bytes`` and ``dropped`` are bad.
        left: calls whose clients may leave.
        stuck: calls whose clients stop reading for good.
        short: when the router had no descriptors.
    """

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.seen: Counter[str] = Counter()
        self.port = port
        self.left: set[int] = set()
        self.stuck: set[int] = set()
        self.short: list[Span] = []

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
        if not call.status and not body and _within(call.sent_s, self.short):
            return "turned away"  # systems close what there is no descriptor for
        expected = b"".join(router_engine.events(call.tokens))
        if not call.status and call.seed in self.stuck:
            return "cut off" if expected.startswith(body) else "wrong bytes"
        if not call.status or not call.stream:
            return "dropped"
        sent, _, error = body.rpartition(b'data: {"error"')
        return "error event" if error and expected.startswith(sent) else "wrong bytes"


def _within(at: float, spans: Iterable[Span]) -> bool:
    return any(begin <= at <= end for begin, end in spans)


class _Router:
    """The router process.

    Attributes:
        samples: that were taken.
        outs: name of an engine and time, for each engine that the router took out.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process, self._lock = process, asyncio.Lock()
        self.samples: list[Sample] = []
        self.outs: list[tuple[str, float]] = []

    async def line(self) -> str:
        if self._process.stdout is None:
            raise RuntimeError("it has no output")
        found = (await self._process.stdout.readline()).decode()
        if not found:
            raise ConfigError("the router process ended.")
        return found

    async def _ask(self, what: str) -> Sample:
        if self._process.stdin is None:
            raise RuntimeError("it has no input")
        async with self._lock:
            self._process.stdin.write(f"{what}\n".encode())
            found: Sample = json.loads(await self.line())
        return found

    async def sample(self, at_s: float) -> Sample:
        found = {"at_s": round(at_s, 1), **await self._ask("")}
        self.outs += [(name, at) for name, at in found.pop("outs")]
        self.samples.append(found)
        return found

    async def run_short(self, length_s: float) -> Span:
        """Leave it without descriptors for a time; return when that was."""
        began = perf_counter()
        await self._ask(str(length_s))
        return began, perf_counter()

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
        away = await _load(args, rng, engines, client, router)
        client.close()
        after = await _when(router, args.minutes * 60.0, lambda s: not left_over(before, s))
    finally:
        await router.stop()
        for engine in engines:
            await engine.stop()
    return {
        "seen": dict(client.seen),
        "deaths": sum(map(len, away.values())),
        "shortages": len(client.short),
        "outs": len(router.outs),
        "without_cause": without_cause(router.outs, away),
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
) -> dict[str, list[Span]]:
    """Call, and let things go wrong, until the time is over.

    Returns:
        When each engine was away, by the name that the router has for it.
    """
    began, calls = perf_counter(), set[asyncio.Task[None]]()
    away: dict[str, list[Span]] = {f"engine-{i}": [] for i in range(len(engines))}
    trouble = [
        asyncio.ensure_future(_churn(engines, away, rng)),
        asyncio.ensure_future(_shortages(router, client, rng)),
        asyncio.ensure_future(_sampling(router, args.every)),
    ]

    def start(work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        calls.add(task)
        task.add_done_callback(calls.discard)

    slow_at, workflows = rng.uniform(*_SLOW_EVERY_S), 0
    while (now := perf_counter() - began) < args.minutes * 60.0:
        start(_workflow(client, rng, workflows))
        workflows += 1
        if now >= slow_at:
            slow_at = now + rng.uniform(*_SLOW_EVERY_S)
            start(_slow(client, rng, workflows))
            workflows += 1
        await asyncio.sleep(rng.expovariate(args.rate / STAGES))
    for task in trouble:
        task.cancel()
    await asyncio.gather(*trouble)
    while calls:
        await asyncio.wait(calls)
    return away


async def _sampling(router: _Router, every_s: float) -> None:
    """Take samples until cancelled."""
    began = perf_counter()
    with suppress(asyncio.CancelledError):
        while True:
            await asyncio.shield(router.sample(perf_counter() - began))
            await asyncio.sleep(every_s)


async def _shortages(router: _Router, client: _Judge, rng: random.Random) -> None:
    """Take the router's descriptors, again and again, until cancelled."""
    with suppress(asyncio.CancelledError):
        while True:
            await asyncio.sleep(rng.uniform(*_SHORT_EVERY_S))
            client.short.append((perf_counter(), inf))
            client.short[-1] = await asyncio.shield(router.run_short(rng.uniform(*_SHORT_S)))


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
    await _finish(client, number)


async def _slow(client: _Judge, rng: random.Random, number: int) -> None:
    """Call for a stream and stop reading it: for a while, or for longer than the router bears."""
    seed, stuck = STAGES * number, rng.random() < _STUCK
    tokens, still_s = rng.randint(*_SLOW_TOKENS), rng.uniform(*_PAUSE_S)
    if stuck:
        client.stuck.add(seed)
        tokens, still_s = _STUCK_TOKENS, _STUCK_S
    await client.call(tokens, stream=True, seed=seed, still_s=still_s, patience_s=_SLOW_PATIENCE_S)
    client.stuck.discard(seed)
    await _finish(client, number)


async def _finish(client: _Judge, number: int) -> None:
    """Say that a workflow is over, until the router has heard it."""
    said = (
        f"POST /finish_session?session_id=w{number} HTTP/1.1\r\nHost: a\r\n"
        "Content-Length: 0\r\nConnection: close\r\n\r\n"
    )
    heard = b""
    while not heard.startswith(b"HTTP/1.1 200"):
        with suppress(OSError):  # no descriptor for this connection
            reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
            writer.write(said.encode())
            heard = await reader.read()
            writer.close()
        if not heard:
            await asyncio.sleep(0.5)


async def _churn(
    engines: list[FastEngine], away: dict[str, list[Span]], rng: random.Random
) -> None:
    """Kill engines and start them again until cancelled; note in ``away`` when they were dead."""
    down: FastEngine | None = None
    spans: list[Span] = []
    try:
        while True:
            await asyncio.sleep(rng.uniform(*_CHURN_S))
            i = rng.randrange(len(engines))
            down, spans = engines[i], away[f"engine-{i}"]
            spans.append((perf_counter(), inf))
            await down.stop()
            await asyncio.sleep(rng.uniform(*_DOWN_S))
            await down.start()
            spans[-1] = spans[-1][0], perf_counter()
            down = None
    except asyncio.CancelledError:
        if down is not None:
            await down.start()
            spans[-1] = spans[-1][0], perf_counter()


def without_cause(
    outs: Iterable[tuple[str, float]], away: dict[str, list[Span]]
) -> list[tuple[str, float]]:
    """Return of the engines that the router took out (and when) those that were there."""
    late = {name: [(a, b + _NOTICED_S) for a, b in spans] for name, spans in away.items()}
    return [(name, at) for name, at in outs if not _within(at, late[name])]


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
    wrong += [f"{name} was taken out without cause" for name, _ in found["without_cause"]]
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
        f"{found['deaths']} deaths of engines, {found['outs']} times taken out, "
        f"{found['shortages']} shortages of descriptors, {after['retries']} retries",
        f"RSS {rss['second_quarter']} MiB in the second quarter, {rss['last_quarter']} MiB in the "
        f"last, {rss['most']} MiB at most",
        f"at the end: {after['tasks']} tasks, {after['files']} open files "
        f"(before: {found['before']['tasks']}, {found['before']['files']}), "
        f"{after['open_workflows']} open workflows",
        *(f"WRONG: {one}" for one in found["wrong"]),
    ]
    return "\n".join(lines)
