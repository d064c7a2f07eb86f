"""A request becomes a call: ours and foreign fields, bad input, bytes kept."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from hexgen_vllm.errors import BadRequest
from hexgen_vllm.router.calls.intake import (
    Accepted,
    Intake,
    decoded,
)
from hexgen_vllm.router.calls.prompt import TokenRatios
from hexgen_vllm.router.endpoints import ENDPOINTS
from hexgen_vllm.types import NO_DEADLINE

CHAT, COMPLETIONS, RESPONSES, MESSAGES, EMBEDDINGS = ENDPOINTS
NOW = 1000.0


def read(
    body: Any = None,
    headers: dict[str, str] | None = None,
    endpoint: Any = CHAT,
    only_model: str | None = None,
    raw: bytes | None = None,
) -> Accepted:
    intake = Intake(TokenRatios(), 60.0, ("x-request-id",))
    given = {"model": "m", **(body or {})} if isinstance(body or {}, dict) else body
    data = json.dumps(given).encode() if raw is None else raw
    return intake.read(endpoint, CIMultiDict(headers or {}), data, NOW, lambda: only_model)


def ours(**fields: str) -> dict[str, str]:
    return {f"x-hexgen-{name.replace('_', '-')}": value for name, value in fields.items()}


def test_all_our_headers_arrive() -> None:
    call = read(
        {"max_tokens": 9},
        ours(
            workflow_id="w1", workflow_type="t", workflow_deadline_ms="2500", stage="revise",
            stages_left="3", expected_output_tokens="7", workflow_final="true", tenant="acme",
        ),
    ).call  # fmt: skip
    assert (call.workflow_id, call.workflow_type, call.stage) == ("w1", "t", "revise")
    assert call.deadline_s == NOW + 2.5
    assert (call.stages_left, call.expected_output_tokens, call.max_output_tokens) == (3, 7, 9)
    assert (call.final, call.tenant, call.model) == (True, "acme", "m")


@pytest.mark.parametrize(
    ("endpoint", "keep_s"), [(CHAT, 3600.0), (MESSAGES, 3600.0), (EMBEDDINGS, None)]
)
def test_a_mark_on_a_part_of_the_prompt_keeps_its_kv(endpoint: Any, keep_s: float | None) -> None:
    part = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": "1h"}}
    body = {"messages": [{"role": "user", "content": [part]}]}
    assert read(body, endpoint=endpoint).keep_s == keep_s
    assert read(body, ours(keep_ms="2000"), endpoint).keep_s == 2.0


def test_the_body_says_the_same_and_headers_win() -> None:
    xargs = {"hexgen_workflow_id": "body", "hexgen_stage": "s", "other": 1}
    call = read({"vllm_xargs": xargs}, ours(workflow_id="header")).call
    assert (call.workflow_id, call.stage) == ("header", "s")


def test_a_lone_call_is_its_own_workflow_and_ends_it() -> None:
    intake = Intake(TokenRatios(), 60.0, ())
    raw = b'{"model": "m"}'
    calls = [intake.read(CHAT, CIMultiDict(), raw, NOW, None).call for _ in range(2)]
    assert calls[0].workflow_id != calls[1].workflow_id
    assert " " in calls[0].workflow_id, "which no client can send"
    assert all(call.final and call.deadline_s == NO_DEADLINE for call in calls)


def test_a_workflow_goes_on_and_keeps_its_deadline() -> None:
    call = read(headers=ours(workflow_id="w")).call
    assert not call.final
    assert call.deadline_s == NO_DEADLINE, "so that a call without one does not move it"
    assert call.stages_left is None


def test_a_foreign_session_has_a_deadline_per_call() -> None:
    """A chat that lasts for hours is not an overdue workflow, and owes nothing after this call."""
    call = read(headers={"X-Session-ID": "chat-1"}).call
    assert (call.workflow_id, call.workflow_type) == ("chat-1", "session")
    assert (call.deadline_s, call.stages_left, call.final) == (NOW + 60.0, 0, False)
    assert read(headers={"X-Session-ID": "c", **ours(stages_left="2")}).call.stages_left == 2
    assert read(headers={"X-Session-ID": "c", **ours(workflow_id="w")}).call.workflow_id == "w"
    assert read(headers={"X-Session-ID": "c", "X-Dynamo-Session-Final": "1"}).call.final


def test_a_timeout_is_an_upper_bound() -> None:
    for timeout, expected in (("5", 5.0), ("600", 60.0)):
        assert read(headers={"x-litellm-timeout": timeout}).call.deadline_s == NOW + expected
    said = {"x-litellm-timeout": "5", **ours(workflow_deadline_ms="9000")}
    assert read(headers=said).call.deadline_s == NOW + 9.0


@pytest.mark.parametrize(
    ("headers", "asked"),
    [
        (ours(workflow_deadline_ms="9000"), True),
        ({"x-litellm-timeout": "5"}, True),
        ({"x-litellm-timeout": "600"}, False),  # the default comes first
        ({"X-Session-ID": "chat-1"}, False),
        ({}, False),
    ],
)
def test_a_default_deadline_is_nobodys_wish(headers: dict[str, str], asked: bool) -> None:
    assert read(headers=headers).call.deadline_asked is asked


@pytest.mark.parametrize(
    ("endpoint", "body", "limit"),
    [
        (CHAT, {"max_completion_tokens": 5, "max_tokens": 7}, 5),
        (CHAT, {"max_tokens": 7}, 7),
        (CHAT, {}, None),
        (CHAT, {"max_tokens": "7"}, None),
        (CHAT, {"max_tokens": True}, None),
        (CHAT, {"max_tokens": -1}, None),
        (COMPLETIONS, {}, 16),
        (COMPLETIONS, {"max_tokens": 7}, 7),
        (RESPONSES, {"max_output_tokens": 8}, 8),
        (MESSAGES, {"max_tokens": 9}, 9),
        (EMBEDDINGS, {}, 1),
    ],
)
def test_output_limits(endpoint: Any, body: dict[str, Any], limit: int | None) -> None:
    assert read(body, endpoint=endpoint).call.max_output_tokens == limit


def test_the_shortest_output_a_client_demands_is_no_oracle() -> None:
    call = read({"min_tokens": 50, "max_tokens": 50, "ignore_eos": True}).call
    assert call.expected_output_tokens is None


def test_prompts_are_measured() -> None:
    exact = read({"prompt": list(range(1000))}, endpoint=COMPLETIONS).call
    assert (exact.prompt_tokens, len(exact.prefix), exact.prefix_chunk_tokens) == (1000, 3, 256)
    text = read({"prompt": "x" * 4096}, endpoint=COMPLETIONS).call
    assert (text.prompt_tokens, len(text.prefix), text.prefix_chunk_tokens) == (1024, 4, 256)
    assert read().call.prompt_tokens == 1


def test_agentic_context_is_read_and_taken_out() -> None:
    agent = {
        "program_id": "p", "agent_role": "coder", "priority": 2, "deadline_seconds": 5,
        "expected_output_length": 30,
    }  # fmt: skip
    messages = [{"role": "user", "content": "é\ud83d"}]
    accepted = read({"vllm_xargs": {"agentic_context": agent, "k": 1}, "messages": messages})
    call = accepted.call
    assert (call.workflow_id, call.stage, call.priority) == ("p", "coder", 2)
    assert (call.deadline_s, call.expected_output_tokens) == (NOW + 5.0, 30)
    sent = json.loads(accepted.body)
    assert sent == {"model": "m", "messages": messages, "vllm_xargs": {"k": 1}}
    alone = read({"vllm_xargs": {"agentic_context": agent}})
    assert json.loads(alone.body) == {"model": "m"}


def test_any_other_body_keeps_its_bytes() -> None:
    raw = b'{ "model":"m", "vllm_xargs" : {"hexgen_stage":"a"}, "n": 1.0 }'
    assert read(raw=raw).body is raw


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b'"x"', None),
        (b"\xff\xfe\xff", None),
        (b"[" * 100_000, None),
        (b'{"model": ' + b"9" * 5000 + b"}", None),
        (b"{}", "model"),
        (b'{"model": ""}', "model"),
        (b'{"model": 3}', "model"),
    ],
)
def test_bad_bodies(raw: bytes, param: str | None) -> None:
    with pytest.raises(BadRequest) as caught:
        read(raw=raw)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b'{"a": NaN}', math.nan),
        (b'{"a": 1e400}', math.inf),
        (b'{"a": "\\ud800"}', "\ud800"),
        (b'{"a": 123456789012345678901234567890}', 123456789012345678901234567890),
        (b'{"a": 1, "a": 2}', 2),
        ('{"a": "\u00e9"}'.encode("utf-16"), "\u00e9"),
        (b'\xef\xbb\xbf{"a": 1}', 1),
    ],
)
def test_what_pythons_reader_takes_is_taken(raw: bytes, value: object) -> None:
    assert repr(decoded(raw)) == repr({"a": value})  # a NaN equals nothing


@pytest.mark.parametrize("pair", [(b"[", b"]"), (b'{"a":', b"}")], ids=["lists", "objects"])
def test_no_depth_of_nesting_is_the_routers_failure(pair: tuple[bytes, bytes]) -> None:
    head = b'{"model": "m", "prompt": "x", "vllm_xargs": {"agentic_context": {}}, "x": '
    codes = set()
    for depth in range(800, 1005):
        try:
            read(raw=head + pair[0] * depth + b"1" + pair[1] * depth + b"}")
        except BadRequest as error:
            codes.add(error.code)
    assert codes == {"invalid_json"}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(body=st.dictionaries(st.text(), VALUES), cut=st.integers(0, 40), put=st.binary(max_size=2))
def test_bodies_mean_what_pythons_reader_says(body: dict[str, Any], cut: int, put: bytes) -> None:
    raw = json.dumps(body).encode()
    for text in (raw, raw[:cut] + put + raw[cut + len(put) :]):
        try:
            expected = json.loads(text)
        except ValueError:
            expected = None
        if isinstance(expected, dict):
            assert repr(decoded(text)) == repr(expected)
        else:
            with pytest.raises(BadRequest):
                decoded(text)


def test_the_only_model_needs_no_name() -> None:
    assert read(raw=b'{"prompt": "x"}', only_model="tiny").call.model == "tiny"
    assert read(raw=b'{"model": null}', only_model="tiny").call.model == "tiny"
    assert read(raw=b'{"model": ""}', only_model="tiny").call.model == "tiny"


@pytest.mark.parametrize("model", ["0", "false", "[]", "{}", "7"])
def test_a_model_that_is_no_text_is_named(model: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read(raw=b'{"model": %s}' % model.encode(), only_model="tiny")
    assert caught.value.param == "model"


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", "", "1e400"])
@pytest.mark.parametrize("field", ["workflow-deadline-ms", "expected-output-tokens"])
def test_bad_numbers_are_named(field: str, value: str) -> None:
    with pytest.raises(BadRequest, match=f"x-hexgen-{field}") as caught:
        read(headers={f"x-hexgen-{field}": value})
    assert caught.value.param == f"x-hexgen-{field}"


@pytest.mark.parametrize(
    ("headers", "xargs"),
    [
        (ours(workflow_id="x" * 129), {}),
        (ours(workflow_id="a b"), {}),
        (ours(stage="no spaces"), {}),
        (ours(nonsense="1"), {}),
        ({}, {"hexgen_stages_left": -1}),
        ({}, {"hexgen_nonsense": 1}),
        ({}, {"hexgen_workflow_deadline_ms": math.inf}),
    ],
)
def test_other_bad_fields_are_named(headers: dict[str, str], xargs: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as caught:
        read({"vllm_xargs": xargs}, headers)
    assert "hexgen" in (caught.value.param or "")


def test_request_ids() -> None:
    intake = Intake(TokenRatios(), 60.0, ("x-request-id", "request-id"))
    assert intake.request_id(CIMultiDict({"Request-ID": "b"})) == "b"
    assert intake.request_id(CIMultiDict({"X-Request-ID": "a", "Request-ID": "b"})) == "a"
    made = {intake.request_id(CIMultiDict()) for _ in range(3)}
    assert len(made) == 3


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("x" * 257, "x" * 256),
        ("a b\tc", "abc"),
        ("é-1", "-1"),
        ("\udcff\udc00r", "r"),
        ("a\x00\x7fb", "ab"),
    ],
)
def test_odd_request_ids_are_made_fit(sent: str, kept: str) -> None:
    intake = Intake(TokenRatios(), 60.0, ("x-request-id",))
    assert intake.request_id(CIMultiDict({"x-request-id": sent})) == kept


@pytest.mark.parametrize("sent", ["", "  ", "éé"])
def test_a_request_id_of_nothing_is_replaced(sent: str) -> None:
    intake = Intake(TokenRatios(), 60.0, ("x-request-id", "request-id"))
    made = [intake.request_id(CIMultiDict({"x-request-id": sent})) for _ in range(2)]
    assert made[0] != made[1]
    both = CIMultiDict({"x-request-id": sent, "request-id": "b"})
    assert intake.request_id(both) == "b"
