"""Traces of coding agents: Weka/AgentX, TraceLab, Dynamo's request traces."""

from __future__ import annotations

import re
from calendar import monthrange, timegm
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.sim.workloads.traces.lines import Row
from hexgen_vllm.sim.workloads.traces.model import Open, TraceCall, TraceWorkflow, link

DYNAMO_SCHEMA: Final = "dynamo.request.trace.v1"
_WEKA_TOKENS: Final = 64
_SUBAGENT: Final = "subagent"
_MOMENT: Final = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)(?:\.(\d{1,12}))?"
    r"(?:Z|([+-])(\d\d):?(\d\d))?",
    re.ASCII,
)
_SAME_S: Final = 1e-6
_CLOCKS_S: Final = 2.0  # times in these traces are in whole seconds, most of them
_SENT: Final = ("user_message", "tool_result")


def moment(row: Row, key: str) -> float:
    """Return a date and time in ISO 8601 as seconds since 1970; UTC unless it says otherwise."""
    text = row.data.get(key)
    found = _MOMENT.fullmatch(text.strip()) if isinstance(text, str) else None
    if found is None:
        raise row.error(key, "a date and time")
    year, month, day, hour, minute, second = map(int, found.group(*range(1, 7)))
    days = monthrange(year, month)[1] if 1 <= month <= 12 and year else 0
    if not 1 <= day <= days or hour > 23 or minute > 59 or second > 60:
        raise row.error(key, "a date and time")
    at_s = float(timegm((year, month, day, hour, minute, second)))
    part, sign, hours, minutes = found.group(7, 8, 9, 10)
    if sign:
        at_s -= (1 if sign == "+" else -1) * 60.0 * (60 * int(hours) + int(minutes))
    return at_s + float(f"0.{part or 0}")


def read_weka(rows: Iterable[Row], silence_s: float, block: int) -> Iterator[TraceWorkflow]:
    """Yield the conversations of Weka's traces, one object each; long silences split them.

    ``requests`` has the calls of the main agent in order: sent at ``t``, answered after
    ``api_time``, ``think_time`` after the one before. One of type ``subagent`` has calls of its
    own. It begins after the call before it, and the first call after its end waits for it.
    """
    for row in rows:
        conversation = _Conversation(row, block)
        for item in row.rows("requests"):
            if item.data.get("type") == _SUBAGENT:
                conversation.subagent(item)
                continue
            call = _weka_call(item, 0.0, "")
            if call is None:
                continue
            if conversation.silence_before(item, call) > silence_s:
                yield conversation.workflow
                conversation.begin()
            conversation.add(item, call)
        if conversation.workflow.calls:
            yield conversation.workflow


class _Conversation:
    """The part of a conversation since its last long silence."""

    def __init__(self, row: Row, block: int) -> None:
        self._name = row.text("id", "conversation")
        self._block = block or row.tokens("block_size", _WEKA_TOKENS)
        self._local = row.text("hash_id_scope", "local") == "local"
        self._subagents = 0
        self.begin()

    def begin(self) -> None:
        """Begin a workflow."""
        self.workflow = TraceWorkflow(
            self._name, "agent", block_tokens=self._block, local=self._local
        )
        self._last: int | None = None  # the main agent's last call
        self._running: list[int] = []  # last calls of subagents that nobody has waited for

    def silence_before(self, item: Row, call: TraceCall) -> float:
        """Return the seconds before a call of the main agent in which nobody did anything."""
        calls = self.workflow.calls
        if self._last is None or not calls:
            return 0.0
        busy_s = max((calls[index].end_s or 0.0 for index in self._running), default=0.0)
        gap_s = (call.start_s or 0.0) - max(busy_s, calls[self._last].end_s or 0.0)
        return float(min(self._think_s(item, call), gap_s))

    def add(self, item: Row, call: TraceCall) -> None:
        """Add a call of the main agent."""
        calls = self.workflow.calls
        start_s = call.start_s or 0.0
        joined = [index for index in self._running if (calls[index].end_s or 0.0) <= start_s]
        if self._last is not None:
            before_s = calls[self._last].end_s or 0.0
            call.after = (self._last, *joined)
            call.think_s = self._think_s(item, call)
            if joined:
                ended_s = max(before_s, *(calls[index].end_s or 0.0 for index in joined))
                call.think_s = min(max(start_s - ended_s, 0.0), call.think_s)
        self._running = [index for index in self._running if index not in joined]
        self._last = len(calls)
        calls.append(call)

    def _think_s(self, item: Row, call: TraceCall) -> float:
        """Return the seconds between the main agent's last call and its next.

        ``think_time`` counts from the last call whose ``api_time`` is known. Where that is not the
        call before, the times of both say it.
        """
        assert self._last is not None
        before = self.workflow.calls[self._last]
        gap_s = max((call.start_s or 0.0) - (before.end_s or 0.0), 0.0)
        known = before.end_s != before.start_s
        return float(item.number("think_time", gap_s, 0.0)) if known else gap_s

    def subagent(self, item: Row) -> None:
        """Add the calls of a subagent."""
        calls = self.workflow.calls
        self._subagents += 1
        last = self._last
        before_s = None if last is None else calls[last].end_s or 0.0
        inner = list(item.rows("requests", needed=False))
        base_s, begun_s = _begun(item, inner, before_s)
        ended_s = begun_s if before_s is None else before_s
        for request in inner:
            call = _weka_call(request, base_s, f"subagent-{self._subagents}")
            if call is None:
                continue
            call.stage = item.text("subagent_type", _SUBAGENT)
            start_s = call.start_s or 0.0
            if last is not None:
                call.after, call.think_s = (last,), max(start_s - ended_s, 0.0)
            last, ended_s = len(calls), call.end_s or start_s
            calls.append(call)
        if last is not None and last != self._last:
            self._running.append(last)


def _begun(item: Row, inner: Sequence[Row], before_s: float | None) -> tuple[float, float]:
    """Return what the times of a subagent's calls count from, and when it began.

    Those of AgentX count from the conversation's start, and its ``t`` is when it began. In older
    ones they count from its own start, and its ``t`` is when it ended.
    """
    told_s = item.number("t")
    if inner and told_s > 0 and inner[0].number("t") >= told_s - _SAME_S:
        return 0.0, told_s
    begun_s = told_s - item.number("duration_ms", 0.0, 0.0) / 1e3
    if begun_s < (before_s or 0.0) - _CLOCKS_S:  # it would have begun before it was asked for
        begun_s = told_s
    return begun_s, begun_s


def _weka_call(item: Row, base_s: float, thread: str) -> TraceCall | None:
    prompt, output = item.tokens("in"), item.tokens("out")
    if not prompt or not output:
        return None
    start_s = base_s + item.number("t")
    took_s = item.number("api_time", 0.0, 0.0)
    blocks = item.hashes("hash_ids")
    stage = "answer" if item.text("stop", "") == "end_turn" else "act"
    return TraceCall(stage, prompt, output, start_s, start_s + took_s, blocks, thread=thread)


def read_tracelab(rows: Iterable[Row], silence_s: float, block: int) -> Iterator[TraceWorkflow]:
    """Yield the sessions of TraceLab; a line is one round, ``prefix_tokens`` of it were cached."""
    del block
    sessions = Open(silence_s)
    for row in rows:
        session = row.text("session_id")
        prompt, output = row.tokens("input_tokens_total"), row.tokens("output_tokens")
        cached = row.data.get("prefix_tokens")
        start_s, end_s = _round(row)
        if not prompt or not output:
            continue
        stage = "answer" if row.text("first_input_event_type", "") == "user_message" else "act"
        call = TraceCall(stage, prompt, output, start_s, end_s)
        call.cached = None if cached is None else min(row.tokens("prefix_tokens"), prompt)
        at_s = sessions.newest_s if start_s is None else start_s
        yield from sessions.over(session, at_s)
        workflow = sessions.get(session)
        if workflow is None:
            workflow = TraceWorkflow(session, row.text("provider", "agent"), [], start_s)
        else:
            before = workflow.calls[-1].end_s
            call.after = (len(workflow.calls) - 1,)
            if start_s is not None and before is not None:
                call.think_s = max(start_s - before, 0.0)
        workflow.calls.append(call)
        sessions.keep(session, workflow, at_s if end_s is None else end_s)
    yield from sessions.rest()


def _round(row: Row) -> tuple[float | None, float | None]:
    """Return when a round was sent and when it ended, as far as its events say."""
    sent: list[float] = []
    told: list[float] = []
    for event in row.rows("timing_events", needed=False):
        if event.data.get("timestamp") is None:
            continue
        kind = event.text("event_type", "")
        (sent if kind in _SENT else told).append(moment(event, "timestamp"))
    start_s = max(sent) if sent else min(told) if told else None
    end_s = max(told) if told else start_s
    if start_s is not None and end_s is not None:
        end_s = max(end_s, start_s)
    return start_s, end_s


def dynamo_event(data: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record of a line of Dynamo's request trace, ``None`` when it is none."""
    event = data.get("event", data)
    if isinstance(event, dict) and event.get("schema") == DYNAMO_SCHEMA:
        return event
    return None


def read_dynamo(rows: Iterable[Row], silence_s: float, block: int) -> Iterator[TraceWorkflow]:
    """Yield the workflows of Dynamo's request trace, version 1.

    Requests without ``agent_context`` are workflows of one call. Sessions follow their parents; a
    workflow is a session with all that came of it.
    """
    trees = Open(silence_s)
    root_of: dict[str, str] = {}
    parents: dict[str, str] = {}
    for line in rows:
        event = dynamo_event(dict(line.data))
        if event is None:
            if "event_type" in line.data or "event" in line.data:
                raise ConfigError(f'{line.where}: "schema" must be "{DYNAMO_SCHEMA}".')
            continue
        row = Row(event, line.where)
        if event.get("event_type") != "request_end":
            continue
        call, size = _dynamo_call(row)
        if call is None:
            continue
        size = block or size
        if event.get("agent_context") is None:
            name = row.row("request").text("request_id")
            yield TraceWorkflow(name, "dynamo", [call], call.start_s, block_tokens=size)
            continue
        context = row.row("agent_context")
        session = context.text("session_id")
        call.thread = session
        parent = context.text("parent_session_id", "")
        if parent and parent != session:
            parents[session] = parent
        root = root_of.setdefault(session, root_of.get(parent, parent) or session)
        for over in trees.over(root, call.start_s or 0.0):
            yield link(over, parents)
        workflow = trees.get(root)
        if workflow is None:
            workflow = TraceWorkflow(root, "agent", [], call.start_s, block_tokens=size)
        elif workflow.block_tokens != size:
            raise ConfigError(
                f'{row.where}: "trace_block_size" must be that of the session before.'
            )
        workflow.calls.append(call)
        workflow.arrived_s = min(workflow.arrived_s or 0.0, call.start_s or 0.0)
        trees.keep(root, workflow, call.end_s or 0.0)
    for over in trees.rest():
        yield link(over, parents)


def _dynamo_call(row: Row) -> tuple[TraceCall | None, int]:
    """Return the call of a ``request_end`` and the tokens of its blocks."""
    request = row.row("request")
    replay = request.row("replay")
    prompt, output = replay.tokens("input_length"), request.tokens("output_tokens", 0)
    size = replay.tokens("trace_block_size")
    if not size:
        raise replay.error("trace_block_size", "more than 0")
    told_ms = row.number("event_time_unix_ms", 0.0)
    start_ms = request.number("request_received_ms", None)
    took_ms = request.number("total_time_ms", None, 0.0)
    if took_ms is None:
        took_ms = max(told_ms - (told_ms if start_ms is None else start_ms), 0.0)
    if start_ms is None:
        start_ms = told_ms - took_ms
    if not prompt or not output:
        return None, size
    start_s, end_s = start_ms / 1e3, (start_ms + took_ms) / 1e3
    hashes = replay.hashes("input_sequence_hashes")
    return TraceCall("chat", prompt, output, start_s, end_s, hashes), size
