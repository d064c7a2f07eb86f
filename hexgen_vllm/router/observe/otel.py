"""Spans of calls in OpenTelemetry.

invoke_workflow TYPE              from the first call of a workflow to its end
└── POST /v1/chat/completions     server span of a call
    ├── queue                     from the end of reading the call to its placement
    ├── placement                 the decision, a moment
    └── upstream                  one per try; its ``traceparent`` goes to the engine

A call continues its client's ``traceparent`` if it brings one, and then links to its workflow,
which continues that of the first call. Names and attributes are those that OpenTelemetry gives to
generative AI (``gen_ai.*``), and ours (``hexgen.*``) for what it has no words for.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, MutableMapping
from typing import Final

from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from hexgen_vllm import __version__
from hexgen_vllm.clock import unix_s
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.policy.workflow import WorkflowRun
from hexgen_vllm.router.errors import Outcome
from hexgen_vllm.router.observe.ledger import FAILED, outcome
from hexgen_vllm.router.observe.tracing import CallTrace, Tracing
from hexgen_vllm.types import LONE, Call, CallResult, Placement

_PROTOCOL: Final = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
_PROPAGATOR: Final = TraceContextTextMapPropagator()
_LAST_S: Final = 2.0
_MOST_WORKFLOWS: Final = 20_000
_OPERATION: Final = "gen_ai.operation.name"
_OPERATIONS: Final = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
_Value = str | int | float | bool


class OtelTracing(Tracing):
    """Begins traces that an exporter gets; sampling is OpenTelemetry's own (``OTEL_*``).

    Args:
        to: takes finished spans; called in a thread of its own.
        policy: how calls are placed, an attribute of placements.
    """

    def __init__(self, to: SpanExporter, policy: str) -> None:
        about = {SERVICE_NAME: "hexgen-vllm-router", SERVICE_VERSION: __version__}
        self._provider = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(to))
        self.tracer = self._provider.get_tracer("hexgen_vllm.router", __version__)
        self.policy = policy
        self._workflows: OrderedDict[str, Span] = OrderedDict()

    def begin(self, method: str, path: str, headers: Mapping[str, str]) -> CallTrace:
        """Return the trace of a call; it continues the one in ``headers``.

        Args:
            method: of the request.
            path: of its route, empty where it has none of its own.
            headers: of the request.
        """
        came = {name: headers[name] for name in _PROPAGATOR.fields if name in headers}
        return _OtelTrace(self, method, path, came)

    def workflow(self, call: Call, came: Mapping[str, str], began_ns: int) -> Span | None:
        """Return the span of the workflow of a call, which begins with its first one.

        Args:
            call: the call.
            came: its client's trace.
            began_ns: when it came.
        """
        if call.workflow_id.startswith(LONE):
            return None
        span = self._workflows.get(call.workflow_id)
        if span is None:
            span = self._workflows[call.workflow_id] = self.tracer.start_span(
                f"invoke_workflow {call.workflow_type}",
                context=_PROPAGATOR.extract(came),
                start_time=began_ns,
            )
            _say(span, {
                _OPERATION: "invoke_workflow",
                "gen_ai.workflow.name": call.workflow_type,
                **_identity(call),
            })  # fmt: skip
            if len(self._workflows) > _MOST_WORKFLOWS:
                self._workflows.popitem(last=False)[1].end()
        return span

    def workflow_ended(self, run: WorkflowRun) -> None:
        span = self._workflows.pop(run.workflow_id, None)
        if span is None:
            return
        found = outcome(run)
        _say(span, {
            "hexgen.outcome": found,
            "hexgen.deadline_s": run.deadline_s - run.started_s,
            "hexgen.slack_s": run.deadline_s - run.last_seen_s,
        })  # fmt: skip
        if found == FAILED:
            span.set_status(Status(StatusCode.ERROR, found))
        span.end()

    def close(self) -> None:
        """Send what was not sent yet; a receiver that does not answer is given up soon."""
        while self._workflows:
            self._workflows.popitem()[1].end()
        last = threading.Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        last.join(_LAST_S)


class _OtelTrace(CallTrace):
    """The spans of one call; the first is made when it is known to which workflow it belongs."""

    __slots__ = ("_began_ns", "_came", "_context", "_made", "_method", "_path", "_queue",
                 "_tracer", "_tracing", "_tries", "_upstream")  # fmt: skip

    def __init__(
        self, tracing: OtelTracing, method: str, path: str, came: Mapping[str, str]
    ) -> None:
        self._tracing, self._tracer, self._came = tracing, tracing.tracer, came
        self._method, self._path = method, path
        self._began_ns = int(unix_s() * 1e9)
        self._context = _PROPAGATOR.extract(came)
        self._made: Span | None = None
        self._queue: Span | None = None
        self._upstream: Span | None = None
        self._tries = 0

    @property
    def _root(self) -> Span:
        return self._made or self._begin(None)

    def _begin(self, workflow: Span | None) -> Span:
        links = []
        if workflow is not None and self._came:
            links.append(Link(workflow.get_span_context()))
        elif workflow is not None:
            self._context = set_span_in_context(workflow)
        route = {"http.route": self._path} if self._path else {}
        self._made = self._tracer.start_span(
            f"{self._method} {self._path}".rstrip(),
            context=self._context,
            kind=SpanKind.SERVER,
            attributes={"http.request.method": self._method, **route},
            links=links,
            start_time=self._began_ns,
        )
        self._context = set_span_in_context(self._made)
        return self._made

    def accepted(self, request_id: str, call: Call, agent: str | None = None) -> None:
        root = self._begin(self._tracing.workflow(call, self._came, self._began_ns))
        operation = _OPERATIONS.get(self._path)
        _say(root, {
            "hexgen.request_id": request_id,
            "hexgen.stage": call.stage,
            "gen_ai.request.model": call.model,
            "gen_ai.agent.name": agent or call.workflow_type,
            **_identity(call),
            **({} if operation is None else {_OPERATION: operation}),
        })  # fmt: skip
        self._queue = self._tracer.start_span("queue", context=self._context)

    def placed(self, placement: Placement, now: float) -> None:
        _end(self._queue)
        self._queue = None
        span = self._tracer.start_span("placement", context=self._context)
        end_s = now if placement.finish_s is None else placement.finish_s
        _say(span, {
            "hexgen.policy": self._tracing.policy,
            "hexgen.engine": placement.engine_id,
            "hexgen.reason": placement.reason,
            "hexgen.score": placement.score,
            "hexgen.slack_s": placement.deadline_s - placement.tail_s - end_s,
            "hexgen.tail_s": placement.tail_s,
            "hexgen.expected_output_tokens": placement.expected_output_tokens,
            "hexgen.uncached_tokens": placement.uncached_tokens,
            "hexgen.demoted": placement.background,
        })  # fmt: skip
        span.end()

    def sending(self, engine: str, headers: MutableMapping[str, str]) -> None:
        self._tries += 1
        span = self._tracer.start_span("upstream", context=self._context, kind=SpanKind.CLIENT)
        _say(span, {"hexgen.engine": engine, "hexgen.try": self._tries})
        _PROPAGATOR.inject(headers, context=set_span_in_context(span))
        self._upstream = span

    def first_token(self) -> None:
        if self._upstream is not None:
            self._upstream.add_event("first token")

    def try_failed(self, reason: str) -> None:
        if self._upstream is not None:
            self._upstream.set_status(Status(StatusCode.ERROR, reason))
        _end(self._upstream)
        self._upstream = None

    def ended(self, outcome: str, result: CallResult) -> None:
        counts = {
            "gen_ai.usage.input_tokens": result.prompt_tokens,
            "gen_ai.usage.output_tokens": result.output_tokens,
        }
        known = {name: n for name, n in counts.items() if n is not None}
        _say(self._root, {"hexgen.outcome": outcome, **known})
        if outcome != Outcome.ANSWERED:
            for failed in filter(None, (self._root, self._upstream)):
                failed.set_status(Status(StatusCode.ERROR, outcome))
        for span in (self._queue, self._upstream, self._root):
            _end(span)


def _identity(call: Call) -> dict[str, _Value]:
    """Return what call and workflow have in common."""
    found: dict[str, _Value] = {
        "hexgen.workflow.id": call.workflow_id,
        "hexgen.workflow.type": call.workflow_type,
        "hexgen.tenant": call.tenant,
    }
    if not call.workflow_id.startswith(LONE):
        found["gen_ai.conversation.id"] = call.workflow_id
    return found


def _end(span: Span | None) -> None:
    if span is not None:
        span.end()


def _say(span: Span, attributes: Mapping[str, _Value]) -> None:
    """Set attributes; numbers without bound are left out, receivers refuse them."""
    for name, value in attributes.items():
        if not isinstance(value, float) or math.isfinite(value):
            span.set_attribute(name, value)


def exporter(endpoint: str) -> SpanExporter:
    """Return what sends spans to ``endpoint``, by gRPC unless the environment says HTTP.

    Raises:
        ConfigError: the environment asks for another protocol.
        ImportError: the protocol's package is missing.
    """
    protocol = os.environ.get(_PROTOCOL, "grpc")
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as grpc

        return grpc.OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"))
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http import trace_exporter as http

        return http.OTLPSpanExporter(endpoint=endpoint)
    raise ConfigError(f"{_PROTOCOL} must be grpc or http/protobuf, not {protocol!r}.")
