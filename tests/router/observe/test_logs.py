"""Log lines: one per event, with the request id, machine-readable on request, without any text."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from hexgen_vllm.router.observe import logs
from hexgen_vllm.testing.fake_server import FakeSettings, Fault
from hexgen_vllm.testing.stand import BODIES, Stand, open_stand

SECRET = "attack-at-dawn"


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What the package logs as JSON, at every level."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.formatter("json"))
    root = logging.getLogger("hexgen_vllm")
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield stream
    root.removeHandler(handler)
    root.setLevel(before)


def lines(written: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written.getvalue().splitlines()]


def formatted(message: str, *args: object, level: int = logging.INFO) -> dict[str, Any]:
    record = logging.LogRecord("n", level, __file__, 1, message, args, None)
    found: dict[str, Any] = json.loads(logs.JsonFormatter().format(record))
    assert isinstance(found.pop("time"), float)
    return found


def test_keys_become_fields_with_their_types() -> None:
    assert formatted("engine down engine=%s reason=%r after_s=%.1f n=%d", "e", "why", 2.55, 3) == {
        "level": "info", "logger": "n", "event": "engine down",
        "engine": "e", "reason": "why", "after_s": 2.55, "n": 3,
    }  # fmt: skip


def test_values_without_a_key_belong_to_the_event() -> None:
    assert formatted("engine %s engine=%s reason=%r", "back", "e", None) == {
        "level": "info", "logger": "n", "event": "engine back", "engine": "e", "reason": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("message", "args", "event"),
    [
        ("stopped", (), "stopped"),
        ("50 % of it", (), "50 % of it"),
        ("tuning %s a=1", ("apply",), "tuning apply a=1"),
        ("%d %% of %s", (50, "it"), "50 % of it"),
        ("%(a)s", ({"a": 1},), "1"),
    ],
)
def test_other_messages_are_events_as_they_are(message: str, args: Any, event: str) -> None:
    found = formatted(message, *args)
    assert found == {"level": "info", "logger": "n", "event": event}


def test_an_exception_stays_on_its_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        info = (ValueError, error, error.__traceback__)
    record = logging.LogRecord("n", logging.ERROR, __file__, 1, "failed path=%s", ("/",), info)
    line = logs.JsonFormatter().format(record)
    assert "\n" not in line
    assert json.loads(line)["exception"].endswith("ValueError: two\nlines")


async def several(stand: Stand) -> None:
    """Send calls with a secret prompt: answered, streamed, refused, failed, and not JSON."""
    body = {"messages": [{"role": "user", "content": SECRET}]}
    for i, more in enumerate(({}, {"stream": True}, {"model": "nobody"}, {"fail": True})):
        if more.pop("fail", False):
            stand.engines[0].fault = Fault("status", status=500, body=SECRET.encode())
        async with stand.post(headers={"x-request-id": f"r{i}"}, **body, **more) as answer:
            await answer.read()
    url, headers = stand.router.url + next(iter(BODIES)), {"x-request-id": "r4"}
    async with stand.client.post(url, data=SECRET + "{", headers=headers) as answer:
        await answer.read()


async def test_every_call_has_one_line_with_its_id(written: io.StringIO) -> None:
    async with open_stand(FakeSettings(), disable_retries=True) as stand:
        await several(stand)
    ended = [line for line in lines(written) if line["event"] == "call ended"]
    assert [(line["request_id"], line["outcome"], line["level"]) for line in ended] == [
        ("r0", "answered", "debug"),
        ("r1", "answered", "debug"),
        ("r2", "bad-request", "debug"),
        ("r3", "engine-error", "info"),
        ("r4", "bad-request", "debug"),
    ]
    assert ended[0]["engine"] == "engine-0"
    assert ended[0]["output_tokens"] == 8
    assert ended[0]["tries"] == 1


async def test_no_line_shows_what_was_said(written: io.StringIO) -> None:
    async with open_stand(FakeSettings(), disable_retries=True) as stand:
        await several(stand)
    assert "call ended" in written.getvalue()
    assert SECRET not in written.getvalue()
    assert SECRET[:6] not in written.getvalue()


def test_text_lines_stay_text(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    kept, level = root.handlers[:], root.level
    root.handlers.clear()
    try:
        logs.set_up("warning", "text")
        logging.getLogger("hexgen_vllm.x").warning("engine down engine=%s", "e")
        logging.getLogger("hexgen_vllm.x").info("not shown")
    finally:
        root.handlers[:] = kept
        root.setLevel(level)
    shown = capsys.readouterr().err
    assert shown.endswith("WARNING hexgen_vllm.x engine down engine=e\n")
    assert shown.count("\n") == 1
