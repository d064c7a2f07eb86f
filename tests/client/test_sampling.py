"""Deadlines in sampling params, without vLLM and with its real class."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from hexgen_vllm import wire
from hexgen_vllm.client import with_deadline
from hexgen_vllm.errors import ConfigError


@dataclass
class Params:
    """Has what is needed of ``vllm.SamplingParams``."""

    max_tokens: int = 16
    stop: list[str] = field(default_factory=list)
    extra_args: dict[str, Any] | None = None


def test_the_copy_says_what_was_asked_and_the_original_is_untouched() -> None:
    params = Params(max_tokens=9, extra_args={"kv_transfer_params": {"a": 1}})
    sent = with_deadline(
        params,
        2.5,
        workflow_id="w",
        workflow_type="t",
        stage="s",
        stages_left=0,
        expected_output_tokens=7,
        final=True,
    )
    assert sent.max_tokens == 9
    assert sent.extra_args == {
        "kv_transfer_params": {"a": 1},
        "hexgen_workflow_id": "w",
        "hexgen_workflow_type": "t",
        "hexgen_workflow_deadline_ms": 2500.0,
        "hexgen_stage": "s",
        "hexgen_stages_left": 0,
        "hexgen_expected_output_tokens": 7,
        "hexgen_workflow_final": 1,
    }
    assert params.extra_args == {"kv_transfer_params": {"a": 1}}


def test_what_is_not_said_is_not_sent() -> None:
    assert with_deadline(Params()).extra_args == {}
    assert with_deadline(Params(), 1.0).extra_args == {"hexgen_workflow_deadline_ms": 1000.0}


def test_a_later_deadline_replaces_an_earlier_one() -> None:
    sent = with_deadline(with_deadline(Params(), 1.0, stage="a"), 2.0)
    assert sent.extra_args == {"hexgen_workflow_deadline_ms": 2000.0, "hexgen_stage": "a"}


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"deadline_s": 0.0}, "deadline_s"),
        ({"deadline_s": float("nan")}, "deadline_s"),
        ({"stage": "a b"}, "stage"),
        ({"workflow_id": ""}, "workflow_id"),
        ({"expected_output_tokens": 0}, "expected_output_tokens"),
    ],
)
def test_bad_values_are_refused(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        with_deadline(Params(), **arguments)


@pytest.mark.engine
def test_vllms_own_class_is_copied_whole() -> None:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=9, temperature=0.0, stop=["x"])
    sent = with_deadline(params, 2.5, stage="s")
    assert sent.extra_args is not None
    assert wire.read_leniently(sent.extra_args)[0].workflow_deadline_ms == 2500.0
    assert (sent.max_tokens, sent.temperature, sent.stop) == (9, 0.0, ["x"])
    assert params.extra_args is None
    sent.extra_args = None
    assert sent == params
