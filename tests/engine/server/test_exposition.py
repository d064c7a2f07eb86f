"""A snapshot in Prometheus' text format, read back by Prometheus' own parser."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hexgen_vllm.engine.server.middleware import exposition

SNAPSHOT: dict[str, Any] = {
    "order": "slack",
    "cost": {"c0": 0.01, "p1": 0.0001},
    "fit_error": 0.05,
    "steps": 7,
    "running": 3,
    "waiting": 2,
    "kv_usage": 0.5,
    "kv_tokens": 4096,
    "max_num_seqs": 8,
    "preemptions": {"displaced": 1, "kv": 2},
    "recomputed_tokens": 90,
    "bad_metadata": 0,
    "prefill_share": None,
    "slack_bounds_s": [0.0, 1.0],
    "slack_counts": [1, 3, 1],
}


def samples(text: str, label: str) -> dict[tuple[str, str | None], float]:
    """Return the samples by metric and one of their labels."""
    families = text_string_to_metric_families(text)
    return {(s.name, s.labels.get(label)): s.value for f in families for s in f.samples}


def test_numbers_and_labels() -> None:
    text = exposition(SNAPSHOT)
    assert samples(text, "cause")["hexgen_vllm_preemptions_total", "kv"] == 2
    assert samples(text, "coefficient")["hexgen_vllm_step_cost", "p1"] == 0.0001
    assert samples(text, "order")["hexgen_vllm_info", "slack"] == 1
    assert samples(text, "")["hexgen_vllm_recomputed_tokens_total", None] == 90


def test_slack_buckets_are_cumulative() -> None:
    found = samples(exposition(SNAPSHOT), "le")
    assert [found["hexgen_vllm_slack_calls", le] for le in ("0.0", "1.0", "+Inf")] == [1, 4, 5]


def test_several_ranks_are_told_apart_by_vllms_own_label() -> None:
    second = {**SNAPSHOT, "engine": 5, "steps": 9, "order": 'a"b\\c\nd'}
    families = list(text_string_to_metric_families(exposition({**SNAPSHOT, "engine": 4}, second)))
    assert len({f.name for f in families}) == len(families)
    assert {s.labels["engine"] for f in families for s in f.samples} == {"4", "5"}
    steps = next(f for f in families if f.name == "hexgen_vllm_steps")
    assert [(s.labels["engine"], s.value) for s in steps.samples] == [("4", 7), ("5", 9)]
    info = next(f for f in families if f.name == "hexgen_vllm_info")
    assert info.samples[1].labels["order"] == 'a"b\\c\nd'


def test_what_is_unknown_is_left_out() -> None:
    text = exposition({**SNAPSHOT, "cost": None, "fit_error": None})
    assert "step_cost" not in text
    assert "prefill_time_ratio" not in text


@pytest.mark.parametrize("kind", ["gauge", "counter"])
def test_counters_are_named_as_such(kind: str) -> None:
    families = [f for f in text_string_to_metric_families(exposition(SNAPSHOT)) if f.type == kind]
    assert families
    for family in families:
        names = {s.name for s in family.samples}
        assert all(n.endswith("_total") == (kind == "counter") for n in names), names
