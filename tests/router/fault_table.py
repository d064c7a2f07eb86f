"""Breaks engines in every way there is, and tells in a table what clients and operators see.

python -m tests.router.fault_table docs/router-faults.md    writes the table between its marks
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from hexgen_vllm.testing import ManualClock
from hexgen_vllm.testing.fake_server import FakeServer, FakeSettings, Fault
from hexgen_vllm.testing.stand import Stand, open_stand

BEGIN: Final = "<!-- faults: begin -->"
END: Final = "<!-- faults: end -->"
HEADINGS: Final = (
    "the engine", "with another engine", "alone, JSON", "alone, SSE", "seen after", "engine then",
)  # fmt: skip


class Case(NamedTuple):
    """One way for an engine to fail.

    Attributes:
        name: what the table calls it.
        fault: what each of its generation requests meets; ``None`` is a dead engine.
        stream_fault: the same where the answer is a stream, if it is another.
        hangs: nothing ends it but time.
    """

    name: str
    fault: Fault | None
    stream_fault: Fault | None = None
    hangs: bool = False


def _status(status: int, **headers: str) -> Fault:
    secret = b"Traceback (most recent call last): http://127.0.0.1:1/v1"
    return Fault("status", status=status, body=secret, headers=tuple(headers.items()))


def _within(kind: str) -> tuple[Fault, Fault]:
    return Fault(kind, 1), Fault(kind, 3)  # type: ignore[arg-type]


CASES: Final = (
    Case("refuses connections", None),
    *(Case(f"{name}, before its answer", Fault(kind))  # type: ignore[arg-type]
      for name, kind in (("resets", "reset"), ("closes", "close"), ("half-closes", "half"),
                         ("sends garbage", "garbage"))),
    Case("hangs, before its answer", Fault("hang"), hangs=True),
    *(Case(f"{name}, within its answer", *_within(kind))
      for name, kind in (("resets", "reset"), ("closes", "close"), ("half-closes", "half"),
                         ("sends garbage", "garbage"))),
    Case("ends its answer too early", Fault("close", 1), Fault("cut", 3)),
    Case("hangs, within its answer", *_within("hang"), hangs=True),
    Case("sends byte by byte", Fault("drip")),
    Case("answers 500", _status(500)),
    Case("answers 502", _status(502)),
    Case("answers 504", _status(504)),
    Case("answers 429, Retry-After: 7", _status(429, **{"Retry-After": "7"})),
    Case("answers 503, Retry-After: 7", _status(503, **{"Retry-After": "7"})),
    Case("answers 307, Location", _status(307, Location="http://127.0.0.1:1/x")),
    Case("answers 400", Fault("status", status=400)),
)  # fmt: skip


class Seen(NamedTuple):
    """What one call led to: for the client, how long it took, and the state of the engine."""

    answer: str
    after_s: int
    state: str


@asynccontextmanager
async def _stand(engines: int, clock: ManualClock) -> AsyncIterator[Stand]:
    settings = [FakeSettings() for _ in range(engines)]
    async with open_stand(
        *settings, policy="round_robin", clock=clock, health_check_interval_secs=0.01,
        stats_interval_secs=0.01,
    ) as stand:  # fmt: skip
        loads = stand.context.fleet.engines.values()
        await stand.until(lambda: all(engine.steps for engine in loads))
        for _ in range(engines):  # one that has done nothing yet is given minutes
            await _ask(stand, False)
        clock.advance(3.0)
        await stand.until(
            lambda: all(
                e.steps.get(e.name) == f.steps for e, f in zip(loads, stand.engines, strict=True)
            )
        )
        stand.context.tick()
        for engine in stand.engines:
            engine.received.clear()
        yield stand


async def look(case: Case, engines: int, stream: bool) -> Seen:
    """Send a call to the engine that fails, the first one of ``engines``."""
    clock = ManualClock()
    async with _stand(engines, clock) as stand:
        bad = stand.engines[0]
        bad.fault = case.stream_fault if stream and case.stream_fault else case.fault
        if case.fault is None:
            await bad.stop()
        call = asyncio.ensure_future(_ask(stand, stream))
        after_s = await _pass_time(stand, clock, bad, call) if case.hangs else 0
        answer = await call
        await stand.until(lambda: stand.context.ledger.open == 0)
        stand.assert_settled()
        engine = stand.context.fleet.engines["engine-0"]
        return Seen(answer, after_s, engine.state.value)


async def _pass_time(
    stand: Stand, clock: ManualClock, bad: FakeServer, call: asyncio.Future[str]
) -> int:
    """Move the clock until ``call`` is over; return the seconds that took."""
    await stand.until(lambda: bad.received and stand.context.guard.attempts)
    (attempt,) = stand.context.guard.attempts
    if bad.fault is not None and bad.fault.after is not None:
        await stand.until(lambda: attempt.progress)
    clock.advance(3.0)  # telemetry is read again, and has seen the last step
    engine = stand.context.fleet.engines["engine-0"]
    await stand.until(lambda: engine.steps.get("engine-0") == bad.steps)
    stand.context.tick()
    passed = 0
    while passed < 2000:
        await asyncio.sleep(0.02)
        if call.done() or attempt._reason is not None:  # it was ended: the rest takes no time
            await asyncio.wait([call])
            return passed
        step = 1 if passed < 100 else 10
        passed += step
        clock.advance(step)
        stand.context.tick()
    raise AssertionError("it never ends")


async def _ask(stand: Stand, stream: bool) -> str:
    async with stand.post(stream=stream, max_tokens=6, ignore_eos=True) as answer:
        raw = await answer.read()
        assert b"Traceback" not in raw
        assert b"127.0.0.1" not in raw + str(answer.headers).encode()
        elsewhere = answer.headers.get("x-hexgen-engine") == "engine-1"
        if answer.status != 200:
            return _refusal(answer.status, json.loads(raw), answer.headers)
        text = _broken_off(raw) if stream else None
        if text is None:
            assert b" t5" in raw
            text = "answered"
        return f"{text} by the other" if elsewhere else text


def _refusal(status: int, content: Any, headers: Any) -> str:
    assert set(content["error"]) == {"message", "type", "param", "code"}
    text = f"{status} `{content['error']['code']}`"
    return f"{text}, Retry-After: {headers['Retry-After']}" if "Retry-After" in headers else text


def _broken_off(raw: bytes) -> str | None:
    """Return what a stream that did not end well ended with."""
    last = raw.split(b"\n\n")[-2].removeprefix(b"data: ")
    if last == b"[DONE]":
        return None
    error = json.loads(last)["error"]
    return f"error event `{error['code']}`"


async def row(case: Case) -> tuple[str, ...]:
    """Return the row of ``case``."""
    pair = [await look(case, 2, stream) for stream in (False, True)]
    alone = [await look(case, 1, stream) for stream in (False, True)]
    both = dict.fromkeys(seen.answer for seen in pair)
    return (
        case.name,
        "; ".join(both) if len(both) == 1 else f"{pair[0].answer}; SSE {pair[1].answer}",
        *(seen.answer for seen in alone),
        _times(pair, alone),
        "; ".join(dict.fromkeys(seen.state for seen in pair)),
    )


def _times(pair: list[Seen], alone: list[Seen]) -> str:
    if not any(seen.after_s for seen in (*pair, *alone)):
        return "at once"
    first, last = (" / ".join(dict.fromkeys(f"{one.after_s} s" for one in seen))
                   for seen in (pair, alone))  # fmt: skip
    return f"{first}; alone {last}"


async def table() -> str:
    """Return the table as Markdown."""
    rows = [HEADINGS, tuple("---" for _ in HEADINGS), *[await row(case) for case in CASES]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def inserted(text: str, found: str) -> str:
    """Return ``text`` with ``found`` between its marks."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{found}\n\n{END}{tail}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(inserted(path.read_text(), asyncio.run(table())))
