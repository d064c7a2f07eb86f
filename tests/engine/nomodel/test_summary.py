"""What an engine says of itself at its start is what is in force."""

from __future__ import annotations

import logging

import pytest

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.engine.options import summary
from tests.engine.nomodel.conftest import Build


def test_a_scheduler_says_in_one_line_what_is_on(
    build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="vllm.hexgen"):
        engine = build(hexgen={"order": "edf", "displace": False, "default_deadline_s": 30.0})
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert said.count(summary(engine.scheduler.hexgen_options)) == 1
    (line,) = [text for text in said if "order edf" in text]
    assert "displacement off" in line
    assert "default deadline 30 s" in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "default deadline none"),
        ({}, "order due (late calls last)"),
        ({"demote_late": False}, "order due;"),
        ({}, "displacement on"),
        ({"max_displacements": 7}, "7 times"),
        ({"pace": False}, "pace off"),
        ({"interactive_share": 0.5}, "interactive share 0.5"),
        ({"host_kv_gib": 4.0, "keep_kv": "always"}, "host KV 4 GiB (always)"),
        ({}, "host KV off"),
        ({"max_priority": 0}, "priority 0"),
        ({"min_deadline_s": 2.0}, "deadline at least 2 s"),
    ],
)
def test_each_option_shows(options: dict[str, object], said: str) -> None:
    line = summary(EngineOptions(**options))  # type: ignore[arg-type]
    assert said in line
    assert "\n" not in line
