"""Golden table: what other projects' headers and fields mean here."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hexgen_vllm.router import conventions
from hexgen_vllm.router.conventions import SESSION_HEADERS, Foreign


def read(headers: dict[str, str] | None = None, body: dict[str, Any] | None = None) -> Foreign:
    lower = {name.lower(): value for name, value in (headers or {}).items()}
    return conventions.read(lower, body or {})


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
