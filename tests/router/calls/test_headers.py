"""Golden table: which headers an engine of each kind gets, and what comes back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from yarl import URL

from hexgen_vllm import wire
from hexgen_vllm.router.calls import headers as outbound
from hexgen_vllm.router.calls.intake import Accepted
from hexgen_vllm.router.calls.prompt import Prompt
from hexgen_vllm.router.http.messages import Pairs
from hexgen_vllm.testing.fake_server import FakeSettings
from hexgen_vllm.testing.stand import CHAT, open_stand
from hexgen_vllm.types import Call, EngineKind, Placement

NOW, EPOCH = 1000.0, 900.0
CLIENT = {
    "Host": "router:30000",
    "Authorization": "Bearer client-key",
    "Content-Type": "application/json",
    "Content-Length": "99",
    "Content-Encoding": "deflate",
    "Accept": "text/event-stream",
    "Accept-Encoding": "gzip",
    "Connection": "keep-alive, X-Hop",
    "X-Hop": "1",
    "Transfer-Encoding": "chunked",
    "traceparent": "00-a-b-01",
    "X-Custom": "kept",
    "X-Vllm-Priority": "-9",
    "x-hexgen-stage": "revise",
    "x-hexgen-tail-ms": "5",
    "X-Request-ID": "old",
}
CALL = Call(
    "c1", "w1", NOW, 100, workflow_type="t", stage="revise", tenant="acme", stages_left=2,
    final=True,
)  # fmt: skip
PLACED = Placement(
    "c1", "e1", "finish", due_s=NOW + 20.0, deadline_s=NOW + 30.0, tail_s=10.0,
    expected_output_tokens=64,
)  # fmt: skip
ALL = {
    "authorization": "Bearer client-key",
    "content-type": "application/json",
    "accept": "text/event-stream",
    "traceparent": "00-a-b-01",
    "x-custom": "kept",
    "x-vllm-priority": "-9",
    "host": "engine:8000",
    "accept-encoding": "identity",
    "content-length": "2",
    "x-session-id": "w1",
    "x-request-id": "r1",
}
ENGINE = URL("http://engine:8000/v1/chat/completions?a=b%2Fc", encoded=True)


def pairs(headers: dict[str, str]) -> Pairs:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def accepted(
    headers: dict[str, str] = CLIENT, session: str | None = "w1", priority: int = 0
) -> Accepted:
    prompt = Prompt("", 0, 0)
    return Accepted(replace(CALL, priority=priority), pairs(headers), b"{}", prompt, session)


def sent(
    kind: EngineKind,
    one: Accepted | None = None,
    placed: Placement = PLACED,
    words: str | None = None,
    **extra: str,
) -> dict[str, str]:
    head = outbound.call_head(
        one or accepted(), placed, kind, url=ENGINE, now=NOW, epoch=EPOCH, request_id="r1",
        extra=extra, words=words,
    )  # fmt: skip
    line, *lines = head.decode().removesuffix("\r\n\r\n").split("\r\n")
    assert line == "POST /v1/chat/completions?a=b%2Fc HTTP/1.1"
    found = [(name.lower(), value) for name, value in (one.split(": ", 1) for one in lines)]
    assert len(found) == len(dict(found)), "no header twice"
    return dict(found)


def test_a_stock_engine_is_told_nothing_of_ours() -> None:
    assert sent(EngineKind.FCFS) == ALL


def test_a_priority_engine_gets_the_due_time() -> None:
    assert sent(EngineKind.PRIORITY) == {**ALL, "x-vllm-priority": "120000"}


GATEWAY = Placement(
    "c1", "e1", "finish", due_s=NOW + 20.0, deadline_s=NOW + 30.0, tail_s=10.0, decode_s=4.0
)


@pytest.mark.parametrize(
    ("words", "placed", "priority", "told"),
    [
        ("llm-d", GATEWAY, 0, {"x-llm-d-slo-ttft-ms": "16000"}),
        ("llm-d", replace(GATEWAY, due_s=NOW - 1.0), 2, {"x-llm-d-slo-ttft-ms": "1"}),
        ("llm-d", replace(GATEWAY, due_s=math.inf), 0, {}),
        ("dynamo", GATEWAY, 0, {"x-dynamo-slo-ttft-ms": "16000"}),
        (
            "dynamo", GATEWAY, 3,
            {"x-dynamo-slo-ttft-ms": "16000", "x-dynamo-request-priority": "3"},
        ),
        ("dynamo", replace(GATEWAY, due_s=NOW + 4.0), 0, {}),
        ("none", GATEWAY, 3, {}),
        (None, GATEWAY, 3, {}),
    ],
)  # fmt: skip
def test_a_gateway_of_others_is_told_in_its_own_words(
    words: str | None, placed: Placement, priority: int, told: dict[str, str]
) -> None:
    """The remaining path: what follows the call and its own later tokens are taken off."""
    one = accepted({"X-LLM-D-SLO-TTFT-MS": "7", **CLIENT}, priority=priority)
    found = sent(EngineKind.FCFS, one, placed, words=words)
    expected = {"x-llm-d-slo-ttft-ms": "7", **ALL, **told}
    assert found == expected
    assert "x-llm-d-slo-ttft-ms" not in sent(EngineKind.HEXGEN, placed=placed, words=words)


async def test_engines_with_priorities_are_told_what_the_router_is_told_to_tell_them() -> None:
    """Work so far: the longer of two workflows comes later, whatever their deadlines."""
    told: dict[str, list[int]] = {}
    for by in ("deadline", "attained"):
        async with open_stand(
            FakeSettings(policy="priority"), dispatch={"priority_by": by}
        ) as stand:
            for workflow, deadline_ms in (("long", 1_000), ("long", 1_000), ("new", 90_000)):
                said = {
                    "x-hexgen-workflow-id": workflow,
                    "x-hexgen-workflow-deadline-ms": str(deadline_ms),
                }
                async with stand.post(CHAT, headers=said, max_tokens=4) as answer:
                    assert answer.status == 200
            sent = [one.headers["x-vllm-priority"] for one in stand.received()]
            told[by] = [int(number) for number in sent]
    assert told["deadline"][1] < told["deadline"][2]
    assert told["attained"][0] == told["attained"][2] == 0 < told["attained"][1]


@pytest.mark.parametrize(("priority", "told"), [(3, "-3"), (-2, "2"), (10**13, str(-(10**13)))])
def test_our_engine_gets_the_priority_with_the_polarity_of_vllm(priority: int, told: str) -> None:
    found = sent(EngineKind.HEXGEN, accepted({}, priority=priority))
    assert found["x-vllm-priority"] == told
    assert "x-vllm-priority" not in sent(EngineKind.HEXGEN, accepted({}))


def test_our_engine_gets_every_field() -> None:
    assert sent(EngineKind.HEXGEN) == {
        **ALL,
        "x-hexgen-workflow-id": "w1",
        "x-hexgen-workflow-type": "t",
        "x-hexgen-workflow-deadline-ms": "30000.000",
        "x-hexgen-stage": "revise",
        "x-hexgen-stages-left": "2",
        "x-hexgen-expected-output-tokens": "64",
        "x-hexgen-workflow-final": "1",
        "x-hexgen-tenant": "acme",
        "x-hexgen-tail-ms": "10000.000",
    }


def test_no_field_of_the_wire_is_left_out() -> None:
    one = accepted()
    one.service_class, one.keep_s = "interactive", 5.0
    one.call = replace(one.call, resume_s=1.5)
    told = sent(EngineKind.HEXGEN, one, replace(PLACED, background=True))
    assert {wire.header_name(field) for field in wire.FIELDS} <= set(told)


def test_a_batch_call_goes_to_our_engine_without_the_deadline_that_placed_it() -> None:
    one = accepted()
    one.service_class = "batch"
    meta = wire.from_headers(sent(EngineKind.HEXGEN, one))
    assert meta.service_class == "batch"
    assert meta.workflow_deadline_ms is None


def test_what_is_sent_can_be_read() -> None:
    late = Placement("c1", "e1", "r", due_s=-5.0, deadline_s=-5.0, tail_s=1e12, background=True)
    meta = wire.from_headers(sent(EngineKind.HEXGEN, placed=late))
    assert meta.workflow_deadline_ms == 1.0, "overdue is still a number above 0"
    assert meta.tail_ms == wire.MAX_TIME_MS
    assert meta.background
    never = Placement("c1", "e1", "r")
    assert wire.from_headers(sent(EngineKind.HEXGEN, placed=never)).workflow_deadline_ms is None


def test_an_overdue_call_keeps_its_due_time() -> None:
    """Two overdue calls must not change places because neither may send a negative deadline."""
    early = Placement("c1", "e1", "r", due_s=NOW - 9.0, deadline_s=NOW - 5.0, tail_s=4.0)
    late = replace(early, due_s=NOW - 3.0, deadline_s=NOW - 2.0, tail_s=1.0)
    due = []
    for placement in (early, late):
        meta = wire.from_headers(sent(EngineKind.HEXGEN, placed=placement))
        assert meta.workflow_deadline_ms is not None
        assert meta.tail_ms is not None
        due.append(round((meta.workflow_deadline_ms - meta.tail_ms) / 1000.0, 2))
    assert due == [-9.0, -3.0]


def test_the_clients_own_session_header_stays() -> None:
    one = accepted({**CLIENT, "x-session-id": "theirs"})
    assert sent(EngineKind.FCFS, one)["x-session-id"] == "theirs"
    assert "x-session-id" not in sent(EngineKind.FCFS, accepted(session=None))


def test_an_engine_key_replaces_the_clients() -> None:
    found = sent(EngineKind.FCFS, authorization="Bearer engine-key", traceparent="00-c-d-01")
    assert found["authorization"] == "Bearer engine-key"
    assert found["traceparent"] == "00-c-d-01", "the router's own span is the parent"


def test_stock_priorities_are_in_order() -> None:
    """Client priority first, then due time; never ever goes last; all fit vLLM's int64."""
    order = [(-50.0, 1), (0.0, 1), (math.inf, 1), (-1e12, 0), (-50.0, 0), (0.001, 0), (5.0, 0),
             (1e12, 0), (-1e12, -1), (5.0, -1), (math.inf, -1), (math.inf, -1000),
             (math.inf, -(10**6)), (-1e12, -(10**6) - 1), (0.0, -(10**6) - 2),
             (0.0, -1795400141501), (-1e12, -1795400141502), (-1e12, -(2**62))]  # fmt: skip
    numbers = [outbound.stock_priority(due, priority) for due, priority in order]
    important = [(math.inf, 2**62), (0.0, 1795400141502), (5.0, 1795400141501), (9.0, 10**6 + 1),
                 (5.0, 10**6)]  # fmt: skip
    numbers = [outbound.stock_priority(due, priority) for due, priority in important] + numbers
    assert all(a < b for a, b in pairwise(numbers))
    assert max(map(abs, numbers)) < 2**63


GIVEN = {
    "Content-Type": "application/json", "Content-Length": "5", "Server": "uvicorn",
    "Transfer-Encoding": "chunked", "Connection": "close, X-Own", "X-Own": "1",
    "X-Request-Id": "theirs", "openai-processing-ms": "12",
}  # fmt: skip
KEPT = {
    "Content-Type": "application/json",
    "openai-processing-ms": "12",
    "Server": "hexgen-vllm",
    "x-hexgen-engine": "fast",
    "x-request-id": "r1",
}


def test_answers_keep_their_headers() -> None:
    lines = outbound.answer_head(pairs(GIVEN), "fast", "r1")
    text = b"".join(lines).decode()
    assert dict(line.split(": ", 1) for line in text.split("\r\n")[:-1]) == KEPT


@pytest.mark.parametrize(
    "name",
    [
        "Alt-Svc", "Content-Location", "Link", "Location", "Refresh", "Via",  # where the engine is
        "Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization",
        "Proxy-Connection", "TE", "Trailer", "Transfer-Encoding", "Upgrade",  # of one connection
        "Access-Control-Allow-Origin", "Access-Control-Allow-Credentials",
        "Access-Control-Expose-Headers", "Content-Length", "Server", "X-Request-Id",  # ours to say
    ],
)  # fmt: skip
@pytest.mark.parametrize("spell", [str, str.lower, str.upper])
def test_a_client_is_not_told(name: str, spell: Callable[[str], str]) -> None:
    given = [(spell(name).encode(), b"http://10.0.0.1:8000"), (b"X-Kept", b"1")]
    head = b"".join(outbound.answer_head(given, "fast", "r1"))
    assert b"10.0.0.1" not in head
    assert b"X-Kept: 1\r\n" in head


def test_an_answer_keeps_the_time_of_its_engine() -> None:
    assert b"Date: now\r\n" in outbound.answer_head([(b"Date", b"now")], "fast", "r1")


@pytest.mark.parametrize("named", ["X-Custom", "x-custom , close"])
def test_headers_named_by_connection_stay_here(named: str) -> None:
    assert "x-custom" not in sent(EngineKind.FCFS, accepted({**CLIENT, "Connection": named}))


def test_headers_that_come_twice_go_on_twice() -> None:
    one = Accepted(CALL, [(b"X-A", b"1"), (b"x-a", b"2")], b"", Prompt("", 0, 0), None)
    head = outbound.call_head(
        one, PLACED, EngineKind.FCFS, url=ENGINE, now=NOW, epoch=EPOCH, request_id="r"
    )
    assert b"\r\nX-A: 1\r\nx-a: 2\r\n" in head


@pytest.mark.parametrize(
    ("finish_s", "ends_now", "slack_ms"),
    [(104.0, False, "2000"), (None, False, "6000"), (90.0, False, "6000"), (115.0, False, "-9000"),
     (104.0, True, "6000")],
)  # fmt: skip
def test_slack_is_what_is_left_behind_what_follows(
    finish_s: float | None, ends_now: bool, slack_ms: str
) -> None:
    placed = Placement("c1", "e1", "r", finish_s=finish_s, deadline_s=110.0, tail_s=4.0)
    said = outbound.slack_line(accepted({}), placed, 100.0, ends_now=ends_now)
    assert said == f"x-hexgen-slack-ms: {slack_ms}\r\n".encode()


def test_nobody_says_how_a_call_stands_that_has_no_deadline() -> None:
    placed = Placement("c1", "e1", "r", deadline_s=110.0)
    batch = replace(accepted({}), service_class=wire.BATCH)
    for call, where in ((None, placed), (accepted({}), None), (batch, placed),
                        (accepted({}), Placement("c1", "e1", "r"))):  # fmt: skip
        assert outbound.slack_line(call, where, 100.0, ends_now=True) == b""
