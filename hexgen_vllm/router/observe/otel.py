"""Spans of calls in OpenTelemetry.

POST /v1/chat/completions     server span; continues the client's ``traceparent``
├── queue                     from the end of reading the call to its placement
├── placement                 the decision, a moment
└── upstream                  one per try; its ``traceparent`` goes to the engine
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping, MutableMapping
from typing import Final

from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from hexgen_vllm import __version__
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.router.errors import Outcome
from hexgen_vllm.router.observe.tracing import CallTrace, Tracing
from hexgen_vllm.types import Call, CallResult, Placement

_PROTOCOL: Final = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
_PROPAGATOR: Final = TraceContextTextMapPropagator()
_LAST_S: Final = 2.0
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
        self._tracer = self._provider.get_tracer("hexgen_vllm.router", __version__)
        self._policy = policy

    def begin(self, path: str, headers: Mapping[str, str]) -> CallTrace:
        """Return the trace of a call; it continues the one in ``headers``."""
        came = {name: headers[name] for name in _PROPAGATOR.fields if name in headers}
        span = self._tracer.start_span(
            f"POST {path}",
            context=_PROPAGATOR.extract(came),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": "POST", "http.route": path},
        )
        return _OtelTrace(self._tracer, span, self._policy)

    def close(self) -> None:
        """Send what was not sent yet; a receiver that does not answer is given up soon."""
        last = threading.Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        last.join(_LAST_S)


class _OtelTrace(CallTrace):
    """The spans of one call."""

    __slots__ = ("_context", "_policy", "_queue", "_root", "_tracer", "_tries", "_upstream")

    def __init__(self, tracer: Tracer, root: Span, policy: str) -> None:
        self._tracer, self._root, self._policy = tracer, root, policy
        self._context = set_span_in_context(root)
        self._queue: Span | None = None
        self._upstream: Span | None = None
        self._tries = 0

    def accepted(self, request_id: str, call: Call) -> None:
        _say(self._root, {
            "hexgen.request_id": request_id,
            "hexgen.workflow.id": call.workflow_id,
            "hexgen.workflow.type": call.workflow_type,
            "hexgen.stage": call.stage,
            "hexgen.tenant": call.tenant,
            "gen_ai.request.model": call.model,
        })  # fmt: skip
        self._queue = self._tracer.start_span("queue", context=self._context)

    def placed(self, placement: Placement, now: float) -> None:
        _end(self._queue)
        self._queue = None
        span = self._tracer.start_span("placement", context=self._context)
        end_s = now if placement.finish_s is None else placement.finish_s
        _say(span, {
            "hexgen.policy": self._policy,
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
