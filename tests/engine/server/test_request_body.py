from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen_vllm.errors import BadRequest
from hexgen_vllm.wire import CallMeta, with_fields

NOTHING = CallMeta()
SAID = CallMeta(workflow_id="w1", workflow_deadline_ms=1500.0, workflow_final=True)
XARGS = {"hexgen_workflow_id": "w1", "hexgen_workflow_deadline_ms": 1500.0}
XARGS |= {"hexgen_workflow_final": 1}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
bodies = st.dictionaries(st.text(), json_values)


@given(bodies, st.booleans(), st.sampled_from([None, 1]), st.sampled_from(["", " ", "\n\t "]))
def test_the_fields_are_added_and_nothing_else_changes(
    body: dict[str, Any], ascii_only: bool, indent: int | None, around: str
) -> None:
    text = around + json.dumps(body, ensure_ascii=ascii_only, indent=indent) + around
    try:
        data = text.encode()
    except UnicodeEncodeError:  # a lone surrogate cannot be sent
        return
    if "vllm_xargs" in text:
        return
    assert json.loads(with_fields(data, SAID)) == {**body, "vllm_xargs": XARGS}


def test_without_fields_a_body_comes_back_as_the_same_bytes() -> None:
    body = b' {"prompt": "x",  "vllm_xargs": {"hexgen_stage": "a", "theirs": [1]}} '
    assert with_fields(body, NOTHING) is body


def test_headers_win_over_the_body_and_other_keys_stay() -> None:
    body = b'{"vllm_xargs": {"hexgen_workflow_id": "w2", "hexgen_stage": "a", "theirs": [1]}}'
    said = json.loads(with_fields(body, SAID))["vllm_xargs"]
    assert said == {**XARGS, "hexgen_stage": "a", "theirs": [1]}


def test_null_xargs_count_as_none() -> None:
    assert json.loads(with_fields(b'{"vllm_xargs": null}', SAID)) == {"vllm_xargs": XARGS}


def test_a_prompt_that_speaks_of_vllm_xargs_is_kept() -> None:
    body = {"prompt": 'the word "vllm_xargs" and a lone \ud800', "max_tokens": 2**70}
    found = json.loads(with_fields(json.dumps(body).encode(), SAID))
    assert found == {**body, "vllm_xargs": XARGS}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-le"])
def test_other_encodings_of_json_are_understood(encoding: str) -> None:
    body = json.dumps({"prompt": "é"}, ensure_ascii=False).encode(encoding)
    assert json.loads(with_fields(body, SAID)) == {"prompt": "é", "vllm_xargs": XARGS}


@pytest.mark.parametrize(
    "body",
    [b"", b"  ", b"[1]", b'"x"', b"nonsense", b"[" * 100_000, b"\xff\xfe{", b'{"vllm_xargs'],
)
def test_what_is_no_object_passes_untouched(body: bytes) -> None:
    assert with_fields(body, SAID) == body


@pytest.mark.parametrize("body", [b'{"vllm_xargs": 3}', b'{"vllm_xargs": {"a": 1}, "x": }'])
def test_what_vllm_will_refuse_passes_untouched(body: bytes) -> None:
    assert with_fields(body, SAID) == body


@pytest.mark.parametrize("name", [r"vllm\u005fxargs", r"\u0076llm_xargs", r"vllm_xarg\u0073"])
def test_headers_win_however_the_body_spells_the_name(name: str) -> None:
    theirs = '{"hexgen_workflow_id": "w2", "hexgen_workflow_deadline_ms": 1}'
    found = json.loads(with_fields(f'{{"{name}": {theirs}}}'.encode(), SAID))
    assert found == {"vllm_xargs": XARGS}


@pytest.mark.parametrize("body", [b'{"a": 1', b"{,}", b'{"a" 1}', b'{"a": 1}}', b"{"])
def test_splicing_mends_nothing(body: bytes) -> None:
    with pytest.raises(json.JSONDecodeError):
        json.loads(with_fields(body, SAID))


@pytest.mark.parametrize(
    ("xargs", "param"),
    [
        ({"hexgen_workflow_deadline_ms": -1}, "hexgen_workflow_deadline_ms"),
        ({"hexgen_workflow_deadline_ms": "soon"}, "hexgen_workflow_deadline_ms"),
        ({"hexgen_stage": "a b"}, "hexgen_stage"),
        ({"hexgen_workflow_id": "x" * 129}, "hexgen_workflow_id"),
        ({"hexgen_nonsense": 1}, "hexgen_nonsense"),
    ],
)
@pytest.mark.parametrize("said", [NOTHING, SAID])
def test_a_bad_key_of_the_body_is_the_clients_error(
    xargs: dict[str, Any], param: str, said: CallMeta
) -> None:
    with pytest.raises(BadRequest) as caught:
        with_fields(json.dumps({"vllm_xargs": xargs}).encode(), said)
    assert caught.value.param == param


def test_an_agentic_context_is_read_and_taken_out() -> None:
    context = {"program_id": "p", "deadline_seconds": 2, "agent_role": "revise", "spawn_reason": 1}
    xargs = {"agentic_context": context, "hexgen_stage": "link", "theirs": 1}
    body = json.dumps({"prompt": "x", "vllm_xargs": xargs}).encode()
    assert json.loads(with_fields(body, CallMeta(workflow_id="w"))) == {
        "prompt": "x",
        "vllm_xargs": {
            "hexgen_workflow_id": "w",
            "hexgen_workflow_deadline_ms": 2000.0,
            "hexgen_stage": "link",
            "theirs": 1,
        },
    }


def test_what_cannot_be_read_of_an_agentic_context_counts_as_not_said() -> None:
    context = {"program_id": "with blanks", "deadline_seconds": -1, "expected_output_length": [5]}
    body = json.dumps({"vllm_xargs": {"agentic_context": context}}).encode()
    assert json.loads(with_fields(body, NOTHING)) == {"vllm_xargs": {}}


@pytest.mark.parametrize("tier", ["flex", "batch"])
@pytest.mark.parametrize("xargs", [{}, {"vllm_xargs": {"theirs": 1}}])
def test_a_tier_for_which_nobody_waits_makes_a_batch_call(tier: str, xargs: dict[str, Any]) -> None:
    body = {"prompt": "x", "service_tier": tier, **xargs}
    found = json.loads(with_fields(json.dumps(body).encode(), CallMeta(stage="s")))
    assert found["service_tier"] == "flex", "the only one of the two that vLLM takes"
    assert found["vllm_xargs"]["hexgen_class"] == "batch"
    assert found["vllm_xargs"]["hexgen_stage"] == "s"


def test_our_own_class_goes_before_the_tier() -> None:
    body = json.dumps({"service_tier": "flex", "vllm_xargs": {"hexgen_class": "interactive"}})
    said = [with_fields(body.encode(), NOTHING)]
    tier = json.dumps({"service_tier": "batch"}).encode()
    said.append(with_fields(tier, CallMeta(service_class="interactive")))
    for one in said:
        assert json.loads(one)["vllm_xargs"]["hexgen_class"] == "interactive"


@pytest.mark.parametrize("tier", ["auto", "priority", None, ["batch"]])
def test_other_tiers_are_left_alone(tier: Any) -> None:
    body = json.dumps({"prompt": "x", "service_tier": tier}).encode()
    assert with_fields(body, NOTHING) == body
