"""The field table: strict for clients, lenient in engines, the same in both spellings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen_vllm import wire
from hexgen_vllm.errors import BadRequest
from hexgen_vllm.wire import CallMeta

FULL = CallMeta(
    workflow_id="wf-1",
    workflow_type="text2sql",
    workflow_deadline_ms=1500.5,
    stage="revise",
    stages_left=3,
    expected_output_tokens=120,
    workflow_final=True,
    tenant="acme",
    tail_ms=250.0,
    background=False,
)


def test_round_trip_through_headers_and_xargs() -> None:
    assert wire.from_headers(wire.to_headers(FULL)) == FULL
    assert wire.from_xargs(wire.to_xargs(FULL)) == FULL
    assert wire.read_leniently(wire.to_xargs(FULL)) == (FULL, ())


def test_names_on_the_wire() -> None:
    assert set(wire.to_headers(FULL)) == {
        "x-hexgen-workflow-id",
        "x-hexgen-workflow-type",
        "x-hexgen-workflow-deadline-ms",
        "x-hexgen-stage",
        "x-hexgen-stages-left",
        "x-hexgen-expected-output-tokens",
        "x-hexgen-workflow-final",
        "x-hexgen-tenant",
        "x-hexgen-tail-ms",
        "x-hexgen-background",
    }
    assert all(k.startswith("hexgen_") for k in wire.to_xargs(FULL))


def test_headers_are_case_insensitive_and_others_are_ignored() -> None:
    meta = wire.from_headers({"X-HexGen-Stage": "revise", "Content-Type": "text/plain"})
    assert meta == CallMeta(stage="revise")


BAD = (
    [
        ("x-hexgen-workflow-deadline-ms", v)
        for v in ("", "abc", "nan", "inf", "-inf", "0", "-5", "1e400", "1e13", "1,5")
    ]
    + [("x-hexgen-expected-output-tokens", v) for v in ("0", "-1", "1.5", "nan", "x", "1e99")]
    + [
        ("x-hexgen-stages-left", "-1"),
        ("x-hexgen-stage", "two words"),
        ("x-hexgen-stage", ""),
        ("x-hexgen-stage", "a" * 65),
        ("x-hexgen-stage", "-x"),
        ("x-hexgen-workflow-id", "a" * 129),
        ("x-hexgen-workflow-id", "with space"),
        ("x-hexgen-workflow-id", "ümlaut"),
        ("x-hexgen-workflow-final", "maybe"),
        ("x-hexgen-tail-ms", "-1"),
        ("x-hexgen-deadline", "5"),
    ]
)


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_values_name_the_field(name: str, value: str) -> None:
    with pytest.raises(BadRequest) as caught:
        wire.from_headers({name: value})
    assert caught.value.param == name
    assert name in str(caught.value)
    assert caught.value.status == 400


@pytest.mark.parametrize(("name", "value"), BAD)
def test_an_engine_skips_bad_values_and_says_which(name: str, value: str) -> None:
    key = name.removeprefix("x-").replace("-", "_")
    meta, bad = wire.read_leniently({key: value, "hexgen_tenant": "acme", "other": [1]})
    assert meta == CallMeta(tenant="acme")
    assert bad == (key,)


@pytest.mark.parametrize("value", [True, None, [1], {"a": 1}])
def test_xargs_of_the_wrong_type_are_refused(value: object) -> None:
    with pytest.raises(BadRequest):
        wire.from_xargs({"hexgen_workflow_deadline_ms": value})


def test_json_numbers_are_understood() -> None:
    meta = wire.from_xargs(
        {"hexgen_workflow_deadline_ms": 5, "hexgen_stages_left": 2.0, "hexgen_workflow_final": 1}
    )
    assert meta == CallMeta(workflow_deadline_ms=5.0, stages_left=2, workflow_final=True)


def test_merge_fills_gaps_only() -> None:
    first = CallMeta(stage="a", workflow_final=False)
    second = CallMeta(stage="b", workflow_final=True, tenant="t")
    assert wire.merged(first, second) == CallMeta(stage="a", workflow_final=False, tenant="t")


@given(
    st.dictionaries(
        st.sampled_from(sorted(wire.to_xargs(FULL))),
        st.text() | st.floats() | st.integers() | st.none(),
    )
)
def test_lenient_reading_never_raises(xargs: dict[str, object]) -> None:
    meta, bad = wire.read_leniently(xargs)
    read = [k for k in xargs if getattr(meta, k.removeprefix("hexgen_")) is not None]
    assert sorted([*read, *bad]) == sorted(xargs)
