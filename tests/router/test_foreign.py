"""Golden table: what other projects' headers and fields mean here."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from hexgen_vllm import wire
from hexgen_vllm.router import foreign
from hexgen_vllm.router.foreign import Foreign
from hexgen_vllm.router.words import (
    ANY_VENDOR,
    LEFT,
    WORDS,
    Meaning,
    Word,
    WordPlace,
    as_id,
)

SESSION_HEADERS = [
    word.name
    for word in WORDS
    if word.meaning is Meaning.SESSION and word.place is WordPlace.HEADER
    if word.name != ANY_VENDOR
]


def read(headers: dict[str, str] | None = None, body: dict[str, Any] | None = None) -> Foreign:
    lower = {name.lower(): value for name, value in (headers or {}).items()}
    raw = json.dumps(body or {}, default=str).encode()
    return foreign.read(lower, body or {}, raw)


def agent(**fields: Any) -> dict[str, Any]:
    return {"vllm_xargs": {"agentic_context": fields}}


SESSIONS: list[tuple[dict[str, str], dict[str, Any]]] = [
    ({}, agent(program_id="s")),
    ({}, agent(task_id="s")),
    ({}, agent(session_id="s")),
    ({}, {"agent_hint": {"session_id": "s"}}),
    ({}, {"session_id": "s"}),
    *(({name.upper(): "s"}, {}) for name in SESSION_HEADERS),
    ({"x-cursor-session-id": "s"}, {}),
]


@pytest.mark.parametrize(("headers", "body"), SESSIONS)
def test_every_name_of_a_session(headers: dict[str, str], body: dict[str, Any]) -> None:
    assert read(headers, body).session_id == "s"


def test_the_first_name_wins() -> None:
    """Taking away the names one by one, each shows the value of the next."""
    body: dict[str, Any] = {
        **agent(program_id="0", task_id="1", session_id="2"),
        "agent_hint": {"session_id": "3"},
        "session_id": "4",
    }
    headers = {name: str(5 + i) for i, name in enumerate(SESSION_HEADERS)}
    context = body["vllm_xargs"]["agentic_context"]
    taking: list[tuple[dict[str, Any], str]] = [
        *((context, name) for name in ("program_id", "task_id", "session_id")),
        (body["agent_hint"], "session_id"),
        (body, "session_id"),
        *((headers, name) for name in SESSION_HEADERS),
    ]
    for i, (place, name) in enumerate(taking):
        assert read(headers, body).session_id == str(i)
        del place[name]
    assert read(headers, body).session_id is None


def test_names_that_are_no_session() -> None:
    parents = {"x-parent-session-id": "p", "x-dynamo-parent-session-id": "p", "x-user-id": "u"}
    assert read(parents).session_id is None
    assert read(body={"session_id": 7, "agent_hint": "x", "vllm_xargs": [1]}).session_id is None


def test_illegal_session_ids_become_digests() -> None:
    found = [read({"x-session-id": text}).session_id for text in ("a b", "é", "x" * 200, "x" * 200)]
    assert all(one is not None and one.startswith("h-") and len(one) == 34 for one in found)
    assert found[2] == found[3]
    assert len(set(found)) == 3


PRIORITIES: list[tuple[dict[str, str], dict[str, Any], int]] = [
    ({"X-Vllm-Priority": "3"}, {}, -3),
    ({"X-Vllm-Priority": "-3"}, {"priority": 9}, 3),
    ({}, {"priority": 4}, -4),
    ({}, {"priority": -4}, 4),
    ({"x-request-priority": "2"}, {}, -2),
    ({"x-dynamo-request-priority": "5"}, {}, 5),
    ({}, {"nvext": {"agent_hints": {"priority": 6}}}, 6),
    ({}, agent(priority=7), 7),
    ({}, agent(priority=-7), -7),
    ({"x-smg-priority": "system"}, {}, 2),
    ({"x-smg-priority": "Interactive"}, {}, 1),
    ({"x-smg-priority": "default"}, {}, 0),
    ({"x-smg-priority": "bulk"}, {}, -1),
    ({}, {"service_tier": "priority"}, 1),
    ({}, {"service_tier": "flex"}, -1),
    ({}, {"service_tier": "batch"}, -1),
    ({}, {"service_tier": "auto"}, 0),
    ({}, {"service_tier": 5}, 0),
    ({"X-Vllm-Priority": "soon"}, {}, 0),
    ({"X-Vllm-Priority": "nan"}, {}, 0),
    ({"X-Vllm-Priority": "1e300"}, {}, -(2**62)),
    ({"X-Vllm-Priority": "1795400141501"}, {}, -1795400141501),
    ({}, {"priority": 2**53 + 1}, -(2**53) - 1),
    ({}, {"priority": True}, 0),
    ({}, {"priority": 10**400}, -(2**62)),
    ({}, {"priority": math.nan}, 0),
    ({}, {}, 0),
]


@pytest.mark.parametrize(("headers", "body", "expected"), PRIORITIES)
def test_priorities_point_one_way(
    headers: dict[str, str], body: dict[str, Any], expected: int
) -> None:
    """Inside, higher is sooner."""
    assert read(headers, body).priority == expected


DEADLINES: list[tuple[dict[str, str], dict[str, Any], float | None]] = [
    ({}, agent(deadline_seconds=12.5), 12.5),
    ({"x-litellm-timeout": "3"}, agent(deadline_seconds=12.5), 12.5),
    ({"x-litellm-timeout": "30"}, {}, 30.0),
    ({"x-stainless-read-timeout": "20"}, {}, 20.0),
    ({"x-litellm-timeout": "30", "x-stainless-read-timeout": "20"}, {}, 20.0),
    ({"x-litellm-timeout": "30", "x-stainless-read-timeout": "20"}, {"stream": True}, 30.0),
    ({"x-litellm-timeout": "-1"}, {}, None),
    ({"x-litellm-timeout": "soon"}, {}, None),
    ({}, agent(deadline_seconds="inf"), None),
    ({}, {}, None),
]


@pytest.mark.parametrize(("headers", "body", "expected"), DEADLINES)
def test_deadlines(headers: dict[str, str], body: dict[str, Any], expected: float | None) -> None:
    assert read(headers, body).timeout_s == expected


def test_lengths_tenants_stages_and_ends() -> None:
    assert read(body=agent(expected_output_length=50)).expected_output_tokens == 50
    assert read(body={"nvext": {"agent_hints": {"osl": 60}}}).expected_output_tokens == 60
    assert read(body=agent(expected_output_length=0.2)).expected_output_tokens == 1
    assert read(body=agent(agent_role="planner")).stage == "planner"
    assert read(body=agent(agent_role="not a name")).stage is None
    for name in ("x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id", "X-Tenant-ID"):
        assert read({name: "acme"}).tenant == "acme"
    assert read({"X-Dynamo-Session-Final": "true"}).final
    assert not read({"X-Dynamo-Session-Final": "false"}).final


SAMPLES: list[tuple[dict[str, str], dict[str, Any], Foreign]] = [
    ({"grpc-timeout": "5S"}, {}, Foreign(timeout_s=5.0)),
    ({"grpc-timeout": "250m", "x-litellm-timeout": "3"}, {}, Foreign(timeout_s=0.25)),
    ({"grpc-timeout": "2M"}, {}, Foreign(timeout_s=120.0)),
    ({"grpc-timeout": "5"}, {}, Foreign()),
    ({"grpc-timeout": "123456789S"}, {}, Foreign()),
    ({"x-envoy-expected-rq-timeout-ms": "1500"}, {}, Foreign(timeout_s=1.5)),
    ({"x-envoy-expected-rq-timeout-ms": "0"}, {}, Foreign()),
    # The first token within 1 s and 255 more at 50 ms; at 10 ms; as many as are said.
    ({"x-llm-d-slo-ttft-ms": "1000"}, {}, Foreign(timeout_s=1.0 + 255 * 0.05)),
    ({"x-dynamo-slo-ttft-ms": "1000"}, {}, Foreign(timeout_s=1.0 + 255 * 0.05)),
    (
        {"x-slo-ttft-ms": "1000", "x-slo-tpot-ms": "10"},
        agent(expected_output_length=101),
        Foreign(timeout_s=2.0, expected_output_tokens=101),
    ),
    (
        {"x-slo-ttft-ms": "9000", "x-llm-d-slo-ttft-ms": "1000", "x-llm-d-slo-tpot-ms": "20"},
        {"nvext": {"agent_hints": {"osl": 1}}},
        Foreign(timeout_s=1.0, expected_output_tokens=1),
    ),
    ({"x-llm-d-slo-tpot-ms": "20"}, {}, Foreign()),
    ({"x-dynamo-request-strict-priority": "2"}, {}, Foreign(priority=2)),
    (
        {"x-dynamo-request-strict-priority": "1", "x-dynamo-request-priority": "9"},
        {},
        Foreign(priority=1),
    ),
    ({"x-llm-d-inference-objective": "bulk"}, {}, Foreign(priority=-1)),
    ({"x-dynamo-meta-policy-class": "Interactive"}, {}, Foreign(priority=1)),
    ({"x-dynamo-meta-policy-class": "gold"}, {}, Foreign()),
    ({}, {"nvext": {"agent_hints": {"latency_sensitivity": 3.0}}}, Foreign(priority=3)),
    (
        {"x-claude-code-session-id": "s", "x-claude-code-agent-id": "a-1"},
        {},
        Foreign(session_id="s", agent="a-1"),
    ),
    (
        {"X-Dynamo-Session-ID": "s", "X-Dynamo-Parent-Session-ID": "p"},
        {},
        Foreign(session_id="s", parent_id="p"),
    ),
    ({"x-session-id": "s", "x-parent-session-id": "s"}, {}, Foreign(session_id="s")),
    (
        {},
        agent(program_id="c", parent_program_id="b", root_program_id="a", blocks_parent=False),
        Foreign(session_id="c", root_id="a", parent_id="b", detached=True),
    ),
    (
        {},
        agent(program_id="c", parent_program_id="a b", blocks_parent="true"),
        Foreign(session_id="c", parent_id=as_id("a b")),
    ),
    (
        {},
        agent(expected_resume=12, kv_retention_ttl_seconds="300"),
        Foreign(resume_s=12.0, keep_s=300.0),
    ),
    ({}, agent(expected_resume=False), Foreign(resume_s=0.0)),
    ({}, agent(expected_resume=True), Foreign()),
    ({}, {"nvext": {"agent_hints": {"iat": 750, "prefix_id": "c"}}},
     Foreign(session_id="c", resume_s=0.75)),
    ({}, {"cache_control": {"type": "ephemeral", "ttl": "1h"}}, Foreign(keep_s=3600.0)),
    ({}, {"cache_control": {"type": "ephemeral"}}, Foreign(keep_s=300.0)),
    ({}, {"nvext": {"cache_control": {"type": "ephemeral", "ttl": "45s"}}}, Foreign(keep_s=45.0)),
    ({}, {"cache_control": {"type": "forever"}}, Foreign()),
    (
        {"baggage": "a=1, gen_ai.conversation.id = c%201;p=2 ,gen_ai.agent.name=planner"},
        {},
        Foreign(session_id=as_id("c 1"), agent="planner"),
    ),
    (
        {"baggage": "session.id=b,hexgen.tenant=acme", "x-session-id": "h"},
        {},
        Foreign(session_id="h", tenant="acme"),
    ),
    ({"baggage": ",=;,%,session.id"}, {}, Foreign()),
    ({"baggage": "x=" + "y" * 9000 + ",session.id=b"}, {}, Foreign()),
]  # fmt: skip


@pytest.mark.parametrize(("headers", "body", "expected"), SAMPLES)
def test_what_a_request_says(
    headers: dict[str, str], body: dict[str, Any], expected: Foreign
) -> None:
    found = read(headers, body)
    assert found._replace(timeout_s=None) == expected._replace(timeout_s=None)
    assert found.timeout_s == pytest.approx(expected.timeout_s)


def values(word: Word) -> list[Any]:
    """Return values that this word can have, no two of which mean the same."""
    candidates: list[Any] = [
        "5S", "7S", {"type": "ephemeral", "ttl": "1h"}, {"type": "ephemeral", "ttl": "2h"},
        "system", "bulk", "priority", "flex", "5", "7", "true", "false",
    ]  # fmt: skip
    found: list[Any] = []
    for one in candidates:
        meant = word.form.read(one)
        if meant is not None and meant not in [word.form.read(x) for x in found]:
            found.append(one)
    return found


def said(word: Word, value: Any, headers: dict[str, str], body: dict[str, Any]) -> None:
    if word.place is WordPlace.HEADER:
        headers[word.name.replace("*", "cursor")] = str(value)
        return
    if word.place is WordPlace.BAGGAGE:
        headers["baggage"] = f"{word.name}={value},{headers.get('baggage', '')}"
        return
    if word.place is WordPlace.BLOCK:
        body["messages"] = [{"content": [{"type": "text", "text": "x", word.name: value}]}]
        return
    *path, last = word.name.split(".")
    for name in path:
        body = body.setdefault(name, {})
    body[last] = value


@pytest.mark.parametrize("word", WORDS, ids=lambda word: f"{word.meaning.name}-{word.name}")
def test_every_word_of_the_table_is_read(word: Word) -> None:
    found = []
    for value in values(word):
        headers: dict[str, str] = {}
        body: dict[str, Any] = {}
        said(word, value, headers, body)
        if word.meaning is Meaning.TOKEN:
            headers["x-llm-d-slo-ttft-ms"] = "1"
        found.append(read(headers, body))
    assert len(set(found)) == len(found) >= 2 or found[0] != Foreign()


@pytest.mark.parametrize("meaning", [m for m in Meaning if m is not Meaning.TIMEOUT])
def test_the_order_of_the_table_settles_conflicts(meaning: Meaning) -> None:
    """Of any two words with one meaning that say different things, the one above counts."""
    words = [word for word in WORDS if word.meaning is meaning]
    for i, above in enumerate(words):
        for below in words[i + 1 :]:
            if above.name == below.name:
                continue
            for mine in values(above):
                for theirs in values(below):
                    alone: tuple[dict[str, str], dict[str, Any]] = ({}, {})
                    both: tuple[dict[str, str], dict[str, Any]] = ({}, {})
                    said(above, mine, *alone)
                    said(below, theirs, *both)
                    said(above, mine, *both)
                    ours, whole = read(*alone), read(*both)
                    assert whole == ours._replace(batch=whole.batch), (above.name, below.name)


def marked(ttl: str | None = "5m", **fields: Any) -> dict[str, Any]:
    control = {"type": "ephemeral"} if ttl is None else {"type": "ephemeral", "ttl": ttl}
    return {"type": "text", "text": "x", "cache_control": control, **fields}


BLOCKS: list[tuple[dict[str, Any], float | None]] = [
    ({"messages": [{"role": "user", "content": [marked()]}]}, 300.0),
    ({"messages": [{"role": "user", "content": [marked(None)]}]}, 300.0),
    ({"messages": [{"role": "tool", "content": "x", "cache_control": marked()["cache_control"]}]},
     300.0),
    ({"system": [marked("1h")], "messages": [{"role": "user", "content": [marked()]}]}, 3600.0),
    ({"system": [marked()], "messages": [{"role": "user", "content": [marked("1h")]}]}, 3600.0),
    ({"tools": [{"name": "t", "input_schema": {}, **marked("1h")}]}, 3600.0),
    ({"input": [{"role": "user", "content": [marked("1h")]}]}, 3600.0),
    ({"messages": [{"content": [marked(cache_control={"ttl": "1h", "type": "ephemeral"})]}]},
     3600.0),
    # Said by nobody: text that shows it, a schema with such a name, values that mean nothing.
    ({"messages": [{"role": "user", "content": json.dumps(marked())}]}, None),
    ({"tools": [{"input_schema": {"cache_control": {"type": "object"}}}]}, None),
    ({"messages": [{"content": [marked(cache_control=None), marked(cache_control="5m")]}]}, None),
    ({"messages": [{"content": [marked(cache_control={"type": {"type": "ephemeral"}})]}]}, None),
]  # fmt: skip


@pytest.mark.parametrize(("body", "keep_s"), BLOCKS)
@pytest.mark.parametrize("indent", [None, 2])
def test_marks_on_parts_of_a_prompt(
    body: dict[str, Any], keep_s: float | None, indent: int | None
) -> None:
    raw = json.dumps(body, indent=indent).encode()
    assert foreign.read({}, body, raw).keep_s == keep_s


def test_of_many_marks_few_are_looked_at() -> None:
    many = {"messages": [{"content": [marked()] * 1000 + [marked("1h")]}]}
    assert foreign.read({}, many, json.dumps(many).encode()).keep_s == 300.0
    broken = b'{"cache_control" ' * 100_000
    assert foreign.read({}, {}, broken) == Foreign()


def test_engines_read_an_agentic_context_as_the_router_does() -> None:
    context = {"program_id": "p", "agent_role": "plan", "deadline_seconds": 2,
               "expected_output_length": 9}  # fmt: skip
    engine, router = wire.from_agentic_context(context), read({}, agent(**context))
    assert (engine.workflow_id, engine.stage) == (router.session_id, router.stage)
    assert engine.workflow_deadline_ms == 1000 * (router.timeout_s or 0)
    assert engine.expected_output_tokens == router.expected_output_tokens


def test_no_value_is_too_odd_to_be_read() -> None:
    odd = (10**5000, 1e308, -1, "9" * 400, "nan", "\x00", None, [], {}, [{}])
    for word in WORDS:
        for value in odd:
            word.form.read(value)


def test_what_is_left_unread_is_not_in_the_table() -> None:
    assert not LEFT.keys() & {word.name for word in WORDS}
