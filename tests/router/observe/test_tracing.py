"""Spans of calls: one tree per call, the client's trace continued and passed on, nothing if off."""

from __future__ import annotations

import asyncio
import gzip
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web
from google.protobuf import json_format
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.router import app
from hexgen_vllm.router.app import open_tracing
from hexgen_vllm.router.observe import otel
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.sim.workloads.traces.lines import Row
from hexgen_vllm.sim.workloads.traces.otel import read_otel
from hexgen_vllm.testing.fake_server import FakeSettings, Fault
from hexgen_vllm.testing.stand import Stand, open_stand
from hexgen_vllm.types import CallResult

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CAME = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
SAID = {
    "x-hexgen-workflow-id": "w-1", "x-hexgen-workflow-type": "sql", "x-hexgen-stage": "draft",
    "x-hexgen-workflow-deadline-ms": "60000", "x-request-id": "r-1",
}  # fmt: skip


class Spans:
    """The spans of a router's calls."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracing = otel.OtelTracing(self.exporter, "slack")

    def finished(self) -> dict[str, list[ReadableSpan]]:
        """Return what has been sent, by name, in order of their beginning."""
        self.tracing._provider.force_flush()
        found: dict[str, list[ReadableSpan]] = {}
        for span in sorted(self.exporter.get_finished_spans(), key=lambda s: s.start_time or 0):
            found.setdefault(span.name, []).append(span)
        return found


@pytest.fixture
def spans() -> Iterator[Spans]:
    opened = Spans()
    yield opened
    opened.tracing.close()


async def ask(stand: Stand, headers: dict[str, str], **more: Any) -> int:
    async with stand.post(headers=headers, **more) as answer:
        await answer.read()
        return int(answer.status)


def shown(span: ReadableSpan) -> dict[str, Any]:
    return {k.removeprefix("hexgen."): v for k, v in (span.attributes or {}).items()}


ROOT = "POST /v1/chat/completions"


async def test_a_call_is_one_tree(spans: Spans) -> None:
    async with open_stand() as stand:
        stand.context.tracing = spans.tracing
        assert await ask(stand, {**SAID, **CAME}, stream=True) == 200
        (received,) = stand.received()
    found = spans.finished()
    assert {name: len(of) for name, of in found.items()} == {
        ROOT: 1, "queue": 1, "placement": 1, "upstream": 1, "invoke_workflow sql": 1,
    }  # fmt: skip
    (root,), (upstream,) = found[ROOT], found["upstream"]
    assert root.parent is not None
    assert format(root.parent.span_id, "016x") == PARENT
    for name in ("queue", "placement", "upstream"):
        (child,) = found[name]
        assert child.parent is not None
        assert child.parent.span_id == root.context.span_id
        assert format(child.context.trace_id, "032x") == TRACE
    sent = f"00-{TRACE}-{upstream.context.span_id:016x}-01"
    assert received.headers.getall("traceparent") == [sent]
    assert received.headers["tracestate"] == "vendor=1"
    assert (root.kind, upstream.kind) == (SpanKind.SERVER, SpanKind.CLIENT)
    assert [event.name for event in upstream.events] == ["first token"]


async def test_a_workflow_is_a_span_above_its_calls(spans: Spans) -> None:
    """In the words that other tools know, so that they can play what was recorded here."""
    async with open_stand() as stand:
        stand.context.tracing = spans.tracing
        await ask(stand, {**SAID, "baggage": "gen_ai.agent.name=planner"})
        await ask(stand, {**SAID, **CAME})
        assert "invoke_workflow sql" not in spans.finished(), "it may go on"
        await ask(stand, {**SAID, "x-hexgen-workflow-final": "1"})
        await ask(stand, {})
    found = spans.finished()
    (workflow,) = found["invoke_workflow sql"]
    first, other, last, lone = found[ROOT]
    for call in (first, last):
        assert call.parent is not None
        assert call.parent.span_id == workflow.context.span_id
        assert call.context.trace_id == workflow.context.trace_id
    assert other.parent is not None
    assert format(other.parent.span_id, "016x") == PARENT
    assert [link.context.span_id for link in other.links] == [workflow.context.span_id]
    assert (lone.parent, workflow.parent) == (None, None)
    about = shown(workflow)
    assert about["gen_ai.operation.name"] == "invoke_workflow"
    assert about["gen_ai.conversation.id"] == about["workflow.id"] == "w-1"
    assert about["outcome"] == "on-time"
    assert about["deadline_s"] == pytest.approx(60.0, abs=5.0)
    said = [shown(call) for call in (first, other, lone)]
    assert [one["gen_ai.operation.name"] for one in said] == ["chat"] * 3
    assert [one["gen_ai.agent.name"] for one in said] == ["planner", "sql", "default"]
    assert [one.get("gen_ai.conversation.id") for one in said] == ["w-1", "w-1", None]
    assert (workflow.start_time or 0) <= (first.start_time or 0)


async def test_what_is_recorded_can_be_played(spans: Spans) -> None:
    """A trace of the router is one that ``hexgen-vllm trace`` and simulations take."""
    async with open_stand() as stand:
        stand.context.tracing = spans.tracing
        for stage in ("draft", "revise"):
            await ask(stand, {**SAID, "x-hexgen-stage": stage})
    spans.tracing._provider.force_flush()
    found = json_format.MessageToDict(encode_spans(spans.exporter.get_finished_spans()))
    (workflow,) = read_otel([Row(found, "here")], 60.0, 16)
    assert (workflow.name, workflow.type, workflow.tenant) == ("w-1", "sql", "default")
    assert [(call.stage, call.output) for call in workflow.calls] == [("draft", 8), ("revise", 8)]
    assert [call.after for call in workflow.calls] == [(), (0,)]
    assert workflow.deadline_s is None, "it did not end"


async def test_workflows_that_are_open_at_the_end_are_sent(spans: Spans) -> None:
    async with open_stand() as stand:
        stand.context.tracing = spans.tracing
        await ask(stand, SAID)
        await ask(stand, {**SAID, "x-hexgen-workflow-id": "w-2"})
    spans.tracing.close()
    names = [span.name for span in spans.exporter.get_finished_spans()]
    assert names.count("invoke_workflow sql") == 2


async def test_spans_say_what_was_decided(spans: Spans) -> None:
    async with open_stand() as stand:
        stand.context.tracing = spans.tracing
        await ask(stand, SAID)
    found = spans.finished()
    root, placement = shown(found[ROOT][0]), shown(found["placement"][0])
    assert root["request_id"] == "r-1"
    assert (root["workflow.id"], root["workflow.type"], root["stage"]) == ("w-1", "sql", "draft")
    assert root["outcome"] == "answered"
    assert root["gen_ai.usage.output_tokens"] == 8
    assert placement["engine"] == "engine-0"
    assert (placement["policy"], placement["reason"]) == ("slack", "marginal_cost")
    assert 0 < placement["slack_s"] < 60
    assert shown(found["upstream"][0]) == {"engine": "engine-0", "try": 1}


async def test_every_try_has_a_span(spans: Spans) -> None:
    async with open_stand(FakeSettings(), FakeSettings()) as stand:
        stand.context.tracing = spans.tracing
        stand.engines[0].faults.append(Fault("status", status=500))
        stand.engines[1].faults.append(Fault("status", status=500))
        assert await ask(stand, {}) == 502
    found = spans.finished()
    assert [shown(s)["try"] for s in found["upstream"]] == [1, 2]
    assert len({shown(s)["engine"] for s in found["upstream"]}) == 2
    assert len(found["placement"]) == 2
    for span in (*found["upstream"], *found[ROOT]):
        assert span.status.status_code is StatusCode.ERROR
    assert found[ROOT][0].status.description == "engine-error"


async def test_refused_calls_end_their_spans(spans: Spans) -> None:
    async with open_stand() as stand:
        stand.context.tracing = spans.tracing
        assert await ask(stand, {}, model="nobody") == 404
        assert await ask(stand, {"x-hexgen-stage": "?"}) == 400
    found = spans.finished()
    assert set(found) == {ROOT}
    assert [shown(s)["outcome"] for s in found[ROOT]] == ["bad-request"] * 2


async def test_a_span_says_the_method_and_no_route_where_there_is_none(spans: Spans) -> None:
    async with open_stand(FakeSettings(echoes=("/v1/odd",))) as stand:
        stand.context.tracing = spans.tracing
        async with stand.client.delete(f"{stand.router.url}/v1/odd") as answer:
            assert answer.status == 200
    ((root,),) = (found for name, found in spans.finished().items() if name == "DELETE")
    assert root.attributes is not None
    assert root.attributes["http.request.method"] == "DELETE"
    assert "http.route" not in root.attributes


async def test_without_a_place_for_them_there_are_no_spans() -> None:
    async with open_stand() as stand:
        assert stand.context.tracing is None
        await ask(stand, CAME)
        assert stand.received()[0].headers["traceparent"] == CAME["traceparent"]


async def test_spans_reach_a_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over OTLP and HTTP, at the latest when the router stops."""
    bodies: list[bytes] = []

    async def take(request: web.BaseRequest) -> web.Response:
        raw = await request.read()
        zipped = request.headers.get("Content-Encoding") == "gzip"
        bodies.append(gzip.decompress(raw) if zipped else raw)
        return web.Response()

    runner = web.ServerRunner(web.Server(take))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    endpoint = f"http://127.0.0.1:{port}/v1/traces"
    async with open_stand(otlp_traces_endpoint=endpoint) as stand:
        await ask(stand, SAID)
    await asyncio.wait_for(runner.cleanup(), 60)
    sent = ExportTraceServiceRequest.FromString(bodies[0])
    (resource,) = sent.resource_spans
    service = {one.key: one.value.string_value for one in resource.resource.attributes}
    assert service["service.name"] == "hexgen-vllm-router"
    names = [span.name for scope in resource.scope_spans for span in scope.spans]
    assert sorted(names) == [ROOT, "invoke_workflow sql", "placement", "queue", "upstream"]


def test_a_wrong_protocol_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "pigeon")
    with pytest.raises(ConfigError, match="http/protobuf, not 'pigeon'"):
        open_tracing("http://127.0.0.1:4317", "slack")
    monkeypatch.setitem(__import__("sys").modules, "hexgen_vllm.router.observe.otel", None)
    monkeypatch.delattr("hexgen_vllm.router.observe.otel", raising=False)
    with pytest.raises(ConfigError, match=r"hexgen-vllm\[otel\]"):
        open_tracing("http://127.0.0.1:4317", "slack")


async def test_a_router_that_cannot_trace_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "pigeon")
    options = RouterOptions(port=0, otlp_traces_endpoint="http://127.0.0.1:4317")
    with pytest.raises(ConfigError, match="pigeon"):
        await app.Router(options, DispatchOptions()).start()


def test_a_receiver_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    class Silent(InMemorySpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            answered.wait()
            return SpanExportResult.SUCCESS

    monkeypatch.setattr(otel, "_LAST_S", 0.05)
    tracing = otel.OtelTracing(Silent(), "slack")
    tracing.begin("POST", "/", {}).ended("answered", CallResult(ok=True))
    tracing.close()
    assert not answered.is_set()
    answered.set()
