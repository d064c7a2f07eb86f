"""The router's metrics: what Prometheus' own parser reads, bounded labels, and what they count."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from hexgen_vllm.router.errors import Outcome
from hexgen_vllm.router.metrics import MAX_TENANTS, LabeledHistogram, Usages
from hexgen_vllm.router.observe.ledger import (
    AGAIN,
    IDLE_USES,
    OTHER,
    OUTCOMES,
    BoundedNames,
)
from hexgen_vllm.testing.fake_server import FakeSettings, Fault
from hexgen_vllm.testing.stand import Stand, open_stand
from hexgen_vllm.types import Call, CallResult

# Labels whose values clients or operators make up; all of them are capped or counted by hand.
LABELS = {
    "endpoint", "outcome", "reason", "engine", "kind", "le", "type", "tenant", "model",
    "claim", "outlook", "version", "policy", "what",
}  # fmt: skip


async def read(stand: Stand) -> dict[str, Metric]:
    async with stand.get("/metrics") as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return {f.name: f for f in text_string_to_metric_families(await answer.text())}


def values(family: Metric, *labels: str) -> dict[tuple[str, ...], float]:
    return {tuple(s.labels[name] for name in labels): s.value for s in family.samples}


def happened(family: Metric, *labels: str) -> dict[tuple[str, ...], float]:
    """Return what is not zero."""
    return {key: value for key, value in values(family, *labels).items() if value}


@asynccontextmanager
async def used() -> AsyncIterator[Stand]:
    """A router after one JSON call, one stream, one late workflow and one failure."""
    async with open_stand(FakeSettings(), FakeSettings()) as stand:
        ours = {"x-hexgen-workflow-type": "sql", "x-hexgen-tenant": "blue"}
        late = {**ours, "x-hexgen-workflow-id": "w", "x-hexgen-workflow-deadline-ms": "0.001",
                "x-hexgen-workflow-final": "1"}  # fmt: skip
        for headers, stream in ((ours, False), (ours, True), (late, False)):
            async with stand.post(headers=headers, stream=stream) as answer:
                assert answer.status == 200
                await answer.read()
        for engine in stand.engines:
            engine.fault = Fault("status", status=422)
        async with stand.post() as answer:
            assert answer.status == 422
        yield stand


async def test_everything_has_a_name_a_type_and_a_help_text() -> None:
    async with used() as stand:
        families = await read(stand)
    assert len(families) > 25
    for name, family in families.items():
        assert name.startswith("hexgen_router_")
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram")
        labels = {label for sample in family.samples for label in sample.labels}
        assert labels <= LABELS, name


async def test_calls_tokens_and_workflows_are_counted() -> None:
    async with used() as stand:
        found = await read(stand)
    assert happened(found["hexgen_router_calls"], "endpoint", "outcome") == {
        ("chat", "answered"): 3, ("chat", "bad-request"): 1,
    }  # fmt: skip
    assert happened(found["hexgen_router_tenant_calls"], "tenant", "outcome") == {
        ("blue", "answered"): 3, ("default", "failed"): 1,
    }  # fmt: skip
    tokens = values(found["hexgen_router_model_tokens"], "model", "kind")
    assert tokens["tiny", "output"] == 24
    assert tokens["tiny", "prompt"] > 0
    assert happened(found["hexgen_router_workflows"], "type", "outcome") == {
        ("sql", "on-time"): 2, ("sql", "late"): 1, ("default", "failed"): 1,
    }  # fmt: skip
    assert found["hexgen_router_open_calls"].samples[0].value == 0
    first = {s.name.rpartition("_")[2]: s.value
             for s in found["hexgen_router_time_to_first_token_seconds"].samples}  # fmt: skip
    assert first["count"] == 1, "only streams have a first token that can be seen"
    assert found["hexgen_router_call_seconds"].samples[-2].value == 3
    (info,) = found["hexgen_router_info"].samples
    assert info.labels["policy"] == "slack"


async def test_what_is_open_is_measured_at_the_time_of_asking() -> None:
    async with open_stand(FakeSettings(slots=1)) as stand:
        stand.engines[0].fault = Fault("hang", 1)
        headers = {"x-hexgen-workflow-id": "w", "x-hexgen-workflow-deadline-ms": "1"}
        async with stand.post(headers=headers, stream=True) as answer:
            await answer.content.readany()
            found = await read(stand)
    slack = values(found["hexgen_router_slack_calls"], "le")
    assert slack["+Inf",] == slack["0",] == 1
    assert slack["-60",] == 0
    assert values(found["hexgen_router_workflows_at_risk"], "outlook") == {
        ("late",): 1, ("tight",): 0,
    }  # fmt: skip
    assert values(found["hexgen_router_engine_kv_usage_ratio"], "engine") == {("engine-0",): 0.25}
    assert found["hexgen_router_held_tokens"].samples[0].value == 0


def calls(n: int) -> Iterator[Call]:
    for i in range(n):
        yield Call(f"c{i}", f"w{i}", 0.0, 1, tenant=f"t{i}", model=f"m{i}")


def test_clients_cannot_make_more_series_than_there_may_be() -> None:
    usage = Usages()
    for call in calls(3 * MAX_TENANTS):
        usage.add(call, CallResult(ok=True, prompt_tokens=1, output_tokens=2))
    for family in usage.collect():
        by_name = {s.labels.get("tenant", s.labels.get("model")) for s in family.samples}
        assert len(by_name) == MAX_TENANTS + 1
        assert OTHER in by_name
        assert sum(s.value for s in family.samples) in (3 * MAX_TENANTS, 9 * MAX_TENANTS)


def test_what_was_not_answered_has_no_tokens() -> None:
    usage = Usages()
    usage.add(next(calls(1)), CallResult(ok=False, prompt_tokens=5, reason="abort"))
    counted = [s.value for family in usage.collect() for s in family.samples]
    assert sorted(counted) == [0, 0, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("type_", ["a" * 64, "x:y/z.0-_"])
async def test_names_from_clients_survive_the_text_format(type_: str) -> None:
    async with open_stand() as stand:
        async with stand.post(headers={"x-hexgen-workflow-type": type_}) as answer:
            await answer.read()
        found = await read(stand)
    assert happened(found["hexgen_router_workflows"], "type", "outcome") == {(type_, "on-time"): 1}


def test_times_fall_into_cumulative_buckets() -> None:
    by_endpoint = LabeledHistogram("t_seconds", "Times", "endpoint")
    for seconds in (0.0005, 0.001, 0.3, 1000.0):
        by_endpoint.observe(seconds, "chat")
    (family,) = by_endpoint.collect()
    found = {(s.name.rpartition("_")[2], s.labels.get("le")): s.value for s in family.samples}
    assert [found["bucket", le] for le in ("0.001", "0.25", "0.5", "320.0", "+Inf")] == [
        2,
        2,
        3,
        3,
        4,
    ]
    assert found["count", None] == 4
    assert found["sum", None] == pytest.approx(1000.3015)
    assert {s.labels["endpoint"] for s in family.samples} == {"chat"}
    (plain,) = LabeledHistogram("u_seconds", "Times").collect()
    assert {s.value for s in plain.samples} == {0.0}, "known before the first one"


async def test_every_outcome_is_there_from_the_first_scrape() -> None:
    async with open_stand(tune="suggest") as stand:
        found = await read(stand)
        counted = values(found["hexgen_router_calls"], "endpoint", "outcome")
        assert {outcome for _, outcome in counted} == {outcome.value for outcome in Outcome}
        assert {("chat", "answered"), ("other", "internal-error")} <= counted.keys()
        assert {
            outcome for _, outcome in values(found["hexgen_router_workflows"], "type", "outcome")
        }
        for name in ("calls_received", "calls", "retries", "workflows", "tune_events"):
            family = found[f"hexgen_router_{name}"]
            assert family.samples, name
            assert not any(sample.value for sample in family.samples), name


async def test_a_type_and_a_tenant_are_there_before_their_first_call_has_ended() -> None:
    """Prometheus sees no increase in a counter that appears with its first event."""
    async with open_stand() as stand:
        stand.engines[0].fault = Fault("hang")
        headers = {"x-hexgen-workflow-type": "sql", "x-hexgen-tenant": "blue"}
        waiting = asyncio.ensure_future(stand.post(headers=headers))
        await stand.until(stand.received)
        found = await read(stand)
        waiting.cancel()
    kinds = values(found["hexgen_router_workflows"], "type", "outcome")
    assert {kinds["sql", outcome] for outcome in OUTCOMES} == {0}
    assert values(found["hexgen_router_tenant_calls"], "tenant", "outcome")["blue", "failed"] == 0
    assert values(found["hexgen_router_model_tokens"], "model", "kind")["tiny", "output"] == 0


async def test_models_that_nobody_serves_are_no_labels(stand: Stand) -> None:
    for i in range(5):
        async with stand.post(model=f"junk-{i}") as answer:
            assert answer.status == 404
    found = await read(stand)
    assert not [one for one in values(found["hexgen_router_model_tokens"], "model", "kind")
                if one[0].startswith("junk")]  # fmt: skip


def test_junk_does_not_keep_the_places_of_names() -> None:
    usage = Usages()
    good = CallResult(ok=True, output_tokens=1)

    def call_of(tenant: str) -> None:
        usage.add(Call("c", "w", 0.0, 1, tenant=tenant, model="m"), good)

    def shown() -> dict[str, float]:
        (family, *_) = usage.collect()
        return {
            s.labels["tenant"]: s.value for s in family.samples if s.labels["outcome"] == "answered"
        }

    for i in range(MAX_TENANTS - 1):
        call_of(f"junk-{i}")
    call_of("early")
    for i in range(2 * IDLE_USES):
        call_of(f"more-junk-{i}")
        if i % 100 == 0:
            call_of("early")
            call_of("late")
    found, n = shown(), MAX_TENANTS + 2 * IDLE_USES + 2 * (2 * IDLE_USES // 100 + 1)
    assert {"early", "late", OTHER} <= found.keys()
    assert not [name for name in found if name.startswith("more-junk")]
    assert len(found) == MAX_TENANTS + 1
    assert sum(found.values()) == n, "nothing is lost when a name loses its place"


def test_junk_does_not_take_the_places_of_names_in_use() -> None:
    gone: list[str] = []
    name = BoundedNames(4, gone.append)
    real = ["a", "b", "c", "d"]
    assert [name(one) for one in real] == real
    for i in range(20 * IDLE_USES):
        assert name(f"junk-{i // (2 * AGAIN)}") == OTHER
        if i % 50 == 0:
            assert [name(one) for one in real] == real
    assert not gone
