"""OpenTelemetry's spans of generative AI, in the JSON of OTLP.

A call is a span with ``gen_ai.usage.input_tokens`` and ``gen_ai.usage.output_tokens`` that is no
agent or workflow and lies in no other call. A workflow is what has one ``hexgen.workflow.id``, else
one ``gen_ai.conversation.id``, else one trace. The nearest agent above a call is its thread.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.sim.workloads.traces.lines import Row
from hexgen_vllm.sim.workloads.traces.model import Open, TraceCall, TraceWorkflow, link

_OPERATION: Final = "gen_ai.operation.name"
_ABOVE: Final = ("invoke_agent", "create_agent", "invoke_workflow", "execute_tool", "embeddings")
_INPUT: Final = ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens")
_OUTPUT: Final = ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens")
_CACHED: Final = ("gen_ai.usage.cache_read.input_tokens", "gen_ai.usage.cached_tokens")
_WORKFLOW: Final = ("hexgen.workflow.id", "gen_ai.conversation.id", "session.id")
_VALUES: Final = ("stringValue", "intValue", "doubleValue", "boolValue")
_FAILED: Final = 2


class _Span:
    """What is needed of a span."""

    def __init__(self, row: Row) -> None:
        self.trace, self.name = row.text("traceId"), row.text("spanId")
        self.parent = str(row.data.get("parentSpanId") or "")
        self.start_s = row.number("startTimeUnixNano") / 1e9
        self.end_s = max(row.number("endTimeUnixNano") / 1e9, self.start_s)
        values = {item.text("key"): _value(item) for item in row.rows("attributes", needed=False)}
        self.told = Row(values, row.where)
        self.operation = self.told.text(_OPERATION, "")
        status = row.row("status", needed=False).data.get("code")
        self.failed = status in (_FAILED, "STATUS_CODE_ERROR")

    def is_call(self) -> bool:
        """Return whether it stands for one answered call."""
        counts = all(self.told.data.get(self.told.first(*keys)) for keys in (_INPUT, _OUTPUT))
        return counts and self.operation not in _ABOVE and not self.failed


def _value(item: Row) -> Any:
    value = item.row("value", needed=False).data
    return next((value[kind] for kind in _VALUES if kind in value), None)


def is_otel(data: Mapping[str, Any]) -> bool:
    """Return whether a first object is OTLP's."""
    return isinstance(data.get("resourceSpans"), list)


def read_otel(rows: Iterable[Row], silence_s: float, block: int) -> Iterator[TraceWorkflow]:
    """Yield workflows; spans of one must not be further apart than ``silence_s``."""
    del block
    workflows = Open(silence_s)
    spans: dict[str, list[_Span]] = {}  # of the workflows that are open, all kinds

    def finished(over: TraceWorkflow) -> Iterator[TraceWorkflow]:
        known = spans.pop(over.name, [])
        if _fill(over, known):
            yield over

    for row in rows:
        for span in _spans(row):
            named = span.told.first(*_WORKFLOW)
            key = span.told.text(named, "") or span.trace
            for over in workflows.over(key, span.start_s):
                yield from finished(over)
            if workflows.get(key) is None:
                workflows.keep(key, TraceWorkflow(key, "agent"), span.start_s)
            workflow = workflows.get(key)
            assert workflow is not None
            spans.setdefault(key, []).append(span)
            workflows.keep(key, workflow, max(span.end_s, workflows.newest_s))
    for over in workflows.rest():
        yield from finished(over)


def _spans(row: Row) -> Iterator[_Span]:
    for resource in row.rows("resourceSpans"):
        for scope in resource.rows("scopeSpans", needed=False):
            for span in scope.rows("spans", needed=False):
                yield _Span(span)


def _fill(workflow: TraceWorkflow, spans: list[_Span]) -> bool:
    """Make the calls of a workflow out of its spans; return whether there is one."""
    by_name = {span.name: span for span in spans}
    parents: dict[str, str] = {}
    for span in spans:
        told = span.told
        workflow.tenant = told.text("hexgen.tenant", workflow.tenant)
        kind = told.text("hexgen.workflow.type", "") or told.text("gen_ai.agent.name", "")
        if kind and (workflow.type == "agent" or span.operation == "invoke_workflow"):
            workflow.type = kind[:128]
        deadline_s = told.number("hexgen.deadline_s", None, 0.0)
        workflow.deadline_s = workflow.deadline_s if deadline_s is None else deadline_s
        if not span.is_call() or any(above.is_call() for above in _above(span, by_name)):
            continue
        agents = [a.name for a in _above(span, by_name) if a.operation == "invoke_agent"]
        parents.update(zip(agents, [*agents[1:], ""], strict=False))
        call = TraceCall(
            told.text("hexgen.stage", "") or span.operation or "chat",
            told.tokens(told.first(*_INPUT)),
            told.tokens(told.first(*_OUTPUT)),
            span.start_s,
            span.end_s,
            thread=agents[0] if agents else "",
        )
        cached = told.first(*_CACHED)
        if cached in told.data:
            call.cached = min(told.tokens(cached, 0), call.prompt)
        workflow.calls.append(call)
    if not workflow.calls:
        return False
    workflow.arrived_s = min(call.start_s or 0.0 for call in workflow.calls)
    workflow.latency_s = max(call.end_s or 0.0 for call in workflow.calls) - workflow.arrived_s
    link(workflow, parents)
    return True


def _above(span: _Span, by_name: Mapping[str, _Span]) -> Iterator[_Span]:
    seen = {span.name}
    above = by_name.get(span.parent)
    while above is not None and above.name not in seen:
        seen.add(above.name)
        yield above
        above = by_name.get(above.parent)


class OtelWriter:
    """Writes one line of OTLP for each workflow: a span for it, and one for each call.

    Calls without recorded times get the earliest that their think times allow, and no length.
    """

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._count = 0

    def add(self, workflow: TraceWorkflow) -> None:
        """Write a workflow."""
        trace = hashlib.blake2b(f"{self._count}".encode(), digest_size=16).hexdigest()
        self._count += 1
        arrived_s = workflow.arrived_s or 0.0
        identity = f"{workflow.name}/{self._count}"
        starts: list[float] = []
        ends: list[float] = []
        spans: list[dict[str, Any]] = []
        for index, call in enumerate(workflow.calls):
            ready_s = max((ends[before] for before in call.after), default=arrived_s)
            start_s = ready_s + call.think_s if call.start_s is None else call.start_s
            starts.append(start_s)
            ends.append(max(start_s, start_s if call.end_s is None else call.end_s))
            cached = {} if call.cached is None else {_CACHED[0]: call.cached}
            spans.append(_span(trace, index + 1, f"chat {call.stage}", starts[-1], ends[-1], {
                _OPERATION: "chat",
                _INPUT[0]: call.prompt,
                _OUTPUT[0]: call.output,
                **cached,
                "gen_ai.conversation.id": identity,
                "hexgen.workflow.id": identity,
                "hexgen.stage": call.stage,
            }))  # fmt: skip
        about: dict[str, Any] = {
            _OPERATION: "invoke_workflow",
            "gen_ai.conversation.id": identity,
            "hexgen.workflow.id": identity,
            "hexgen.workflow.type": workflow.type,
            "hexgen.tenant": workflow.tenant,
        }
        if workflow.deadline_s is not None:
            about["hexgen.deadline_s"] = float(workflow.deadline_s)
        first_s, last_s = min(arrived_s, *starts), max(ends)
        root = _span(trace, 0, f"invoke_workflow {workflow.type}", first_s, last_s, about)
        resource = {"attributes": _attributes({"service.name": "hexgen-vllm"})}
        scope = {"scope": {"name": "hexgen_vllm.trace"}, "spans": [root, *spans]}
        data = {"resourceSpans": [{"resource": resource, "scopeSpans": [scope]}]}
        self._write(json.dumps(data, separators=(",", ":")) + "\n")


def _span(
    trace: str, index: int, name: str, start_s: float, end_s: float, told: Mapping[str, Any]
) -> dict[str, Any]:
    first_s = min(start_s, end_s)
    if first_s < 0:
        raise ConfigError("OpenTelemetry has no moments before 1970.")
    return {
        "traceId": trace,
        "spanId": f"{index + 1:016x}",
        "parentSpanId": f"{1:016x}" if index else "",
        "name": name,
        "kind": 3 if index else 1,
        "startTimeUnixNano": str(round(start_s * 1e9)),
        "endTimeUnixNano": str(round(end_s * 1e9)),
        "attributes": _attributes(told),
    }


def _attributes(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _typed(value)} for key, value in told.items()]


def _typed(value: Any) -> dict[str, Any]:
    if isinstance(value, int):
        return {"intValue": str(value)}
    return {"doubleValue": value} if isinstance(value, float) else {"stringValue": value}
