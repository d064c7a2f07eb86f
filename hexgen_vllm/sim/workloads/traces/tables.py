"""Traces of single requests in CSV: Azure's LLM inference traces and BurstGPT."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from hexgen_vllm.sim.workloads.traces.agents import moment
from hexgen_vllm.sim.workloads.traces.lines import Row
from hexgen_vllm.sim.workloads.traces.model import Open, TraceCall, TraceWorkflow

AZURE: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURSTGPT: Final = ("Timestamp", "Request tokens", "Response tokens")


def read_azure(rows: Iterable[Row], silence_s: float, block: int) -> Iterator[TraceWorkflow]:
    """Yield one workflow of one call for each line."""
    del silence_s, block
    for row in rows:
        at_s = moment(row, AZURE[0])
        prompt, output = row.tokens(AZURE[1]), row.tokens(AZURE[2])
        if prompt and output:
            call = TraceCall("chat", prompt, output, at_s)
            yield TraceWorkflow("request", "azure", [call], at_s)


def read_burstgpt(rows: Iterable[Row], silence_s: float, block: int) -> Iterator[TraceWorkflow]:
    """Yield conversations and single calls; lines without response tokens failed and are left out.

    Calls of one ``Session ID`` follow each other; ``Elapsed time`` is how long an answer took.
    """
    del block
    sessions = Open(silence_s)
    for row in rows:
        at_s = row.number(BURSTGPT[0])
        prompt, output = row.tokens(BURSTGPT[1]), row.tokens(BURSTGPT[2])
        if not prompt or not output:
            continue
        took_s = row.number("Elapsed time", None)
        call = TraceCall(row.text("Model", "chat"), prompt, output, at_s)
        call.end_s = None if took_s is None else at_s + max(took_s, 0.0)
        kind = row.text("Log Type", "burstgpt")
        session = str(row.data.get("Session ID") or "")
        if session in ("", "-1", "nan"):
            yield TraceWorkflow("request", kind, [call], at_s)
            continue
        yield from sessions.over(session, at_s)
        workflow = sessions.get(session)
        if workflow is None:
            workflow = TraceWorkflow(session, kind, [], at_s)
        else:
            before = workflow.calls[-1]
            since_s = before.end_s if before.end_s is not None else before.start_s
            call.after = (len(workflow.calls) - 1,)
            call.think_s = max(at_s - (at_s if since_s is None else since_s), 0.0)
        workflow.calls.append(call)
        sessions.keep(session, workflow, at_s if call.end_s is None else call.end_s)
    yield from sessions.rest()
