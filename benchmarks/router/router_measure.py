"""What is measured of a router, and of the way without one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Final

from benchmarks.router.router_engine import FastEngine
from benchmarks.router.router_load import Call, Client
from benchmarks.router.router_sides import Side
from hexgen_vllm.errors import ConfigError

EVENTS: Final = 50
_START_S: Final = 30.0
_JSON_PER_S: Final = 400.0
_SSE_PER_S: Final = 60.0
_OPEN_S: Final = 10.0  # longest wait for all streams to be open
_UNDERWAY: Final = 2  # events of a stream between engine and client, when speed is measured
_STEP_S: Final = 0.01
_TURN_S: Final = 1.0  # load on one router before the next has its turn
_SETTLE_S: Final = 0.05  # what a router still does after the last answer
_IDLE_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class Amounts:
    """How much is done, and for how long; the defaults take about a minute per router.

    Attributes:
        cpu_s: seconds of load whose CPU time is measured, each of JSON and events.
        alone: calls in turn whose first byte is timed.
        clients: calls at once whose first byte is timed.
        together_s: for that many seconds.
        speed_streams: streams over which events are pushed as fast as they arrive.
        speed_s: for that many seconds.
        open_streams: streams open at once when memory is measured.
        open_events: events of each.
    """

    cpu_s: float = 5.0
    alone: int = 300
    clients: int = 64
    together_s: float = 4.0
    speed_streams: int = 512
    speed_s: float = 3.0
    open_streams: int = 2000
    open_events: int = 12

    def scaled(self, factor: float) -> Amounts:
        """Return times and counts multiplied by ``factor``, for a shorter look."""
        return replace(
            self,
            cpu_s=self.cpu_s * factor,
            alone=max(round(self.alone * factor), 5),
            together_s=self.together_s * factor,
            speed_s=self.speed_s * factor,
            speed_streams=max(round(self.speed_streams * factor), 10),
            open_streams=max(round(self.open_streams * factor), 10),
            open_events=max(round(self.open_events * factor), 4),
        )


async def ready(side: Side) -> None:
    """Wait until a router answers calls.

    Raises:
        ConfigError: it ended, or did not answer in time.
    """
    give_up = perf_counter() + _START_S
    while perf_counter() < give_up and side.process.poll() is None:
        client = Client(side.port, side.says)
        try:
            if (await client.call(1, stream=False)).status == 200:
                return
        except OSError:
            pass
        finally:
            client.close()
        await asyncio.sleep(0.1)
    raise ConfigError(f"{side.name} did not start: {side.said() or 'it said nothing'}.")


async def cpu_ms(
    running: Sequence[tuple[Side, Client]], seconds: float, *, stream: bool
) -> list[float]:
    """Return the CPU milliseconds of a call in every router: 50 events over 0.5 s, or one body.

    The routers take turns of about a second, so that a machine that slows down slows all of
    them. What a router uses without calls, measured in turns as well, is taken off.
    """
    rate, tokens = (_SSE_PER_S, EVENTS - 1) if stream else (_JSON_PER_S, 16)
    turns = max(round(seconds / _TURN_S), 1)
    calls = max(round(rate * seconds / turns), 1)
    used, idle = [0.0] * len(running), [0.0] * len(running)
    lasted, waited = [0.0] * len(running), [0.0] * len(running)
    for _ in range(turns):
        for i, (side, client) in enumerate(running):
            before, began = side.cpu_s(), perf_counter()
            await _at_rate(client, rate, calls, tokens, stream)
            await asyncio.sleep(_SETTLE_S)
            used[i] += side.cpu_s() - before
            lasted[i] += perf_counter() - began
            before, began = side.cpu_s(), perf_counter()
            await asyncio.sleep(_IDLE_S)
            idle[i] += side.cpu_s() - before
            waited[i] += perf_counter() - began
    return [
        1000.0 * (used[i] - idle[i] * lasted[i] / waited[i]) / (calls * turns)
        for i in range(len(running))
    ]


async def _at_rate(
    client: Client, rate: float, count: int, tokens: int, stream: bool
) -> list[Call]:
    loop = asyncio.get_running_loop()
    began, tasks = loop.time(), []
    for i in range(count):
        await asyncio.sleep(max(began + i / rate - loop.time(), 0.0))
        tasks.append(asyncio.ensure_future(client.call(tokens, stream=stream)))
    return list(await asyncio.gather(*tasks))


async def first_byte_ms(client: Client, amounts: Amounts, clients: int) -> list[float]:
    """Return the times to the first byte: one call after the other, or ``clients`` at once."""
    if clients == 1:
        calls = [await client.call(1, stream=True) for _ in range(amounts.alone)]
    else:
        until = perf_counter() + amounts.together_s

        async def one(i: int) -> list[Call]:
            await asyncio.sleep(i * _STEP_S * EVENTS / clients)
            found = []
            while perf_counter() < until:
                found.append(await client.call(EVENTS - 1, stream=True))
            return found

        many = await asyncio.gather(*(one(i) for i in range(clients)))
        calls = [call for some in many for call in some]
    return [1000.0 * (call.first_s - call.sent_s) for call in calls if call.status == 200]


class _Pulling(Client):
    """Asks the engine for the next event of a stream whenever one arrives."""

    def __init__(self, port: int, says: str, engines: Sequence[FastEngine]) -> None:
        super().__init__(port, says)
        self._engines = engines
        self.events = 0
        self.pulling = True

    def on_events(self, call: Call, count: int) -> None:
        """Ask for as many events as have come, two of them under way at any time."""
        first = call.events == count
        self.events += count
        for engine in self._engines:
            stream = engine.streams.get(call.seed)
            if stream is not None and self.pulling:
                stream.send(count + (_UNDERWAY - 1 if first else 0))
            elif stream is not None:  # it began after the end
                call.sent = stream.finish()

    def stop(self) -> None:
        """End all streams after what was sent so far."""
        self.pulling = False
        for engine in self._engines:
            for seed, stream in list(engine.streams.items()):
                self.underway[seed].sent = stream.finish()


async def events_per_s(
    side: Side | None, port: int, engines: Sequence[FastEngine], amounts: Amounts
) -> tuple[float, float, int]:
    """Return events per second at full speed, the share of its core in use, and lost events.

    Every stream has two events under way: the next one leaves the engine when one has arrived.
    """
    client = _Pulling(port, "" if side is None else side.says, engines)
    tokens = 4_000
    for engine in engines:
        engine.step_s = 0.0
    calls = [
        asyncio.ensure_future(client.call(tokens, stream=True))
        for _ in range(amounts.speed_streams)
    ]
    give_up = perf_counter() + _OPEN_S
    while sum(len(e.streams) for e in engines) < len(calls) and perf_counter() < give_up:
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.3)
    cpu, count, began = 0.0 if side is None else side.cpu_s(), client.events, perf_counter()
    await asyncio.sleep(amounts.speed_s)
    took, done = perf_counter() - began, client.events - count
    busy = 0.0 if side is None else (side.cpu_s() - cpu) / took
    client.stop()
    await asyncio.gather(*calls)
    client.close()
    for engine in engines:
        engine.step_s = _STEP_S
    return done / took, busy, client.lost


async def open_streams(
    side: Side, engines: Sequence[FastEngine], amounts: Amounts
) -> tuple[float, int]:
    """Return resident memory in MiB with all streams open, and lost events."""
    client = Client(side.port, side.says)
    for engine in engines:
        engine.step_s = 0.5
    calls = []
    for i in range(amounts.open_streams):
        calls.append(asyncio.ensure_future(client.call(amounts.open_events, stream=True)))
        if i % 20 == 19:
            await asyncio.sleep(0.02)
    most = 0.0
    while any(not call.done() for call in calls):
        if sum(len(engine.streams) for engine in engines) >= 0.99 * amounts.open_streams:
            most = max(most, side.rss_mib())
        await asyncio.sleep(0.1)
    client.close()
    for engine in engines:
        engine.step_s = _STEP_S
    return most, client.lost
