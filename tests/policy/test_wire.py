"""The field table: strict for clients, lenient in engines, the same in both spellings."""

from __future__ import annotations

import math
from decimal import Decimal

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


def test_json_flags_are_understood() -> None:
    meta = wire.from_xargs({"hexgen_workflow_final": True, "hexgen_background": False})
    assert meta == CallMeta(workflow_final=True, background=False)


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


# Every rule: what each field takes, up to its bounds, and what it refuses just beyond them.

NAMES = ["a", "_", "9", "a" * 64, "Az0_.:/-"]
NO_NAMES = ["", "a" * 65, ".a", ":a", "/a", "-a", "a b", "a\n", "a,b", "\xfc", 5, True]
FLAGS = {"1": True, "true": True, "TRUE": True, "1.0": True, 1: True,
         "0": False, "False": False, "0.0": False, 0.0: False}  # fmt: skip
NO_FLAGS = ["", "2", "10", "yes", "no", -1, None, [1]]
NO_NUMBERS = ["", "x", "1,5", "0x10", "nan", "inf", "-inf", "1e400", True, None, [1], {"a": 1},
              10**400]  # fmt: skip
RULES: dict[str, tuple[str, dict[object, object], list[object]]] = {
    "workflow_id": (
        "workflow-id",
        {one: one for one in ("a", "!", "~", "a" * 128)},
        ["", "a" * 129, "a b", " ", "\x7f", "\xe9", "a\n", 5, None],
    ),
    "workflow_type": ("workflow-type", {one: one for one in NAMES}, NO_NAMES),
    "workflow_deadline_ms": (
        "workflow-deadline-ms",
        {"0.001": 0.001, "1": 1.0, "1e12": 1e12, 5: 5.0, 0.5: 0.5},
        [*NO_NUMBERS, "0", "-0.001", "1000000000001", 0, -1],
    ),
    "stage": ("stage", {one: one for one in NAMES}, NO_NAMES),
    "stages_left": (
        "stages-left",
        {"0": 0, "1": 1, "2.0": 2, "2147483647": 2**31 - 1, 0: 0, 3.0: 3},
        [*NO_NUMBERS, "-1", "0.5", "2147483648", -1, 1.5],
    ),
    "expected_output_tokens": (
        "expected-output-tokens",
        {"1": 1, "2147483647": 2**31 - 1, 7: 7},
        [*NO_NUMBERS, "0", "0.5", "1.5", "2147483648", 0],
    ),
    "workflow_final": ("workflow-final", dict(FLAGS), NO_FLAGS),
    "tenant": ("tenant", {one: one for one in NAMES}, NO_NAMES),
    "tail_ms": (
        "tail-ms",
        {"0": 0.0, "0.25": 0.25, "1e12": 1e12, 0: 0.0},
        [*NO_NUMBERS, "-0.001", "1000000000001"],
    ),
    "background": ("background", dict(FLAGS), NO_FLAGS),
    "service_class": (
        "class",
        {"batch": "batch", "interactive": "interactive"},
        ["", "Batch", "batch ", "flex", None, 1],
    ),
    "resume_ms": (
        "resume-ms",
        {"0": 0.0, "1500": 1500.0, 0.5: 0.5},
        [*NO_NUMBERS, "-1", "1000000000001"],
    ),
    "keep_ms": ("keep-ms", {"1": 1.0, 300000: 300000.0}, [*NO_NUMBERS, "0", "-1", 0]),
}
GOOD = [
    (field, given, value) for field, (_, good, _) in RULES.items() for given, value in good.items()
]
REFUSED = [(field, given) for field, (_, _, bad) in RULES.items() for given in bad]


def key(field: str) -> str:
    return "hexgen_" + RULES[field][0].replace("-", "_")


def test_there_is_a_rule_for_every_field() -> None:
    assert list(RULES) == list(wire.FIELDS)
    for field, (name, _, _) in RULES.items():
        assert wire.header_name(field) == f"x-hexgen-{name}"
        assert wire.xarg_name(field) == key(field)


@pytest.mark.parametrize(("field", "given", "value"), GOOD)
def test_what_a_field_takes(field: str, given: object, value: object) -> None:
    read = CallMeta(**{field: value})  # type: ignore[arg-type]
    assert repr(wire.from_xargs({key(field): given})) == repr(read), "of the same type, too"
    assert wire.from_xargs({key(field).upper(): given}) == read
    assert wire.read_leniently({key(field): given}) == (read, ())
    assert wire.from_xargs(wire.to_xargs(read)) == read
    if isinstance(given, str):
        name = f"x-hexgen-{RULES[field][0]}"
        assert wire.from_headers({name: given}) == read
        assert wire.from_headers({name.title(): given}) == read


@pytest.mark.parametrize(("field", "given"), REFUSED)
def test_what_a_field_refuses(field: str, given: object) -> None:
    with pytest.raises(BadRequest) as caught:
        wire.from_xargs({"hexgen_tenant": "t", key(field): given})
    assert (caught.value.param, caught.value.status) == (key(field), 400)
    assert str(caught.value).startswith(f"{key(field)} must be ")
    assert wire.read_leniently({key(field): given}) == (CallMeta(), (key(field),))
    if isinstance(given, str):
        name = f"X-HexGen-{RULES[field][0].title()}"
        with pytest.raises(BadRequest) as caught:
            wire.from_headers({name: given})
        assert caught.value.param == name


@pytest.mark.parametrize(
    "name", ["x-hexgen-", "x-hexgen-stag", "X-Hexgen-Stage-", "x-hexgen-service-class"]
)
def test_a_name_of_ours_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(BadRequest) as caught:
        wire.from_headers({name: "1"})
    assert caught.value.param == name
    with pytest.raises(BadRequest):
        wire.from_xargs({name[2:].replace("-", "_"): "1"})
    assert wire.from_headers({name[3:]: "1"}) == CallMeta(), "one of others is none of our business"


def test_a_header_says_a_value_as_it_is_read() -> None:
    said = wire.to_headers(CallMeta(workflow_deadline_ms=1.25, stages_left=0, workflow_final=False))
    assert said == {
        "x-hexgen-workflow-deadline-ms": "1.250",
        "x-hexgen-stages-left": "0",
        "x-hexgen-workflow-final": "0",
    }
    assert wire.to_xargs(CallMeta(background=True)) == {"hexgen_background": 1}


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ({"program_id": "p"}, CallMeta(workflow_id="p")),
        ({"agent_role": "plan"}, CallMeta(stage="plan")),
        ({"deadline_seconds": 1.5}, CallMeta(workflow_deadline_ms=1500.0)),
        ({"expected_output_length": 12.7}, CallMeta(expected_output_tokens=12)),
        ({"expected_output_length": 0.3}, CallMeta(expected_output_tokens=1)),
        ({"expected_output_length": 0}, CallMeta()),
        ({"deadline_seconds": "soon", "program_id": "p", "other": 1}, CallMeta(workflow_id="p")),
    ],
)
def test_an_agentic_context(said: dict[str, object], read: CallMeta) -> None:
    assert wire.from_agentic_context(said) == read


def test_plain_values_are_those_that_json_has() -> None:
    value = {"a": math.inf, 1: [math.nan, 1.23456789, (2, -math.inf)], "b": {"c": "x", "d": None}}
    assert wire.plain(value) == {
        "a": None,
        "1": [None, 1.23456789, [2, None]],
        "b": {"c": "x", "d": None},
    }
    assert wire.plain(value, 6)["1"] == [None, 1.234568, [2, None]]
    assert wire.plain([b"\xff", Decimal("1.50"), True, {3}]) == ["ff", "1.50", True, [3]]
