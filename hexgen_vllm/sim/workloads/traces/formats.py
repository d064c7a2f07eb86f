"""All formats of traces: which one a file has, its reader, and the writers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.option import known_names
from hexgen_vllm.sim.workloads.trace import ENTRY_KEY, parse_trace
from hexgen_vllm.sim.workloads.traces.agents import (
    dynamo_event,
    read_dynamo,
    read_tracelab,
    read_weka,
)
from hexgen_vllm.sim.workloads.traces.lines import Row, files_of, lines_of, records, table
from hexgen_vllm.sim.workloads.traces.model import SILENCE_S, TraceCall, TraceWorkflow
from hexgen_vllm.sim.workloads.traces.mooncake import (
    AgenticWriter,
    is_agentic,
    read_agentic,
    read_bailian,
    read_mooncake,
)
from hexgen_vllm.sim.workloads.traces.otel import OtelWriter, is_otel, read_otel
from hexgen_vllm.sim.workloads.traces.recorded import RecordedWriter, read_recorded
from hexgen_vllm.sim.workloads.traces.specs import places, specs_of
from hexgen_vllm.sim.workloads.traces.tables import AZURE, BURSTGPT, read_azure, read_burstgpt
from hexgen_vllm.sim.workloads.workload import CallSpec, WorkflowSpec

Reader = Callable[[Iterable[Row], float, int], Iterator[TraceWorkflow]]
_HASHED_TOKENS: Final = 64  # of the blocks that are made where a format needs them


class Format(NamedTuple):
    """One format.

    Attributes:
        text: what it is, for people.
        known_by: whether a file's first object is of it.
        read: yields its workflows.
        is_table: CSV, not JSON.
    """

    text: str
    known_by: Callable[[dict[str, Any]], bool]
    read: Reader
    is_table: bool = False


def _has(*keys: str) -> Callable[[dict[str, Any]], bool]:
    return lambda data: all(key in data for key in keys)


def _has_length(data: dict[str, Any]) -> bool:
    return any(key in data for key in ("input_length", "input_tokens")) and any(
        key in data for key in ("output_length", "output_tokens")
    )


def _read_text2sql(rows: Iterable[Row], silence_s: float, block: int) -> Iterator[TraceWorkflow]:
    del silence_s, block
    for row in rows:
        for spec in parse_trace([row.data], row.where):
            yield _traced(spec)


FORMATS: Final[dict[str, Format]] = {
    "hexgen": Format(
        "recorded by our router, or converted", _has("calls", "type", "arrived_s"), read_recorded
    ),
    "text2sql": Format("text-to-SQL workflows, lengths only", _has(ENTRY_KEY), _read_text2sql),
    "otel": Format("OpenTelemetry's spans of generative AI, OTLP JSON", is_otel, read_otel),
    "agentic-mooncake": Format("Mooncake with dependencies of requests", is_agentic, read_agentic),
    "dynamo": Format(
        "Dynamo's request trace", lambda data: dynamo_event(data) is not None, read_dynamo
    ),
    "weka": Format("conversations of coding agents (Weka, AgentX)", _has("requests"), read_weka),
    "tracelab": Format(
        "rounds of coding agents", _has("session_id", "input_tokens_total"), read_tracelab
    ),
    "bailian": Format("turns of chats", _has("chat_id", "parent_chat_id"), read_bailian),
    "mooncake": Format("requests with hashes of their blocks", _has_length, read_mooncake),
    "azure": Format("Azure's LLM inference traces, CSV", _has(*AZURE), read_azure, True),
    "burstgpt": Format("BurstGPT, CSV", _has(*BURSTGPT), read_burstgpt, True),
}
AUTO: Final = "auto"
NAMES: Final = (AUTO, *FORMATS)


class TraceSource(NamedTuple):
    """A trace and how it is read.

    Attributes:
        path: a file, or a folder of them.
        format: one of :data:`NAMES`.
        silence_s: a workflow of which nothing was heard for so long is over.
        block_tokens: tokens of a hashed block, 0 for what the format says.
    """

    path: Path
    format: str = AUTO
    silence_s: float = SILENCE_S
    block_tokens: int = 0

    def known_format(self, otherwise: str = "") -> str:
        """Return the name of the trace's format; ``otherwise`` is the one of what looks like none.

        Raises:
            ConfigError: the file cannot be read, or is of none.
        """
        first = files_of(self.path)[0]
        if self.format != AUTO:
            if self.format not in FORMATS:
                listed = known_names(self.format, NAMES)
                raise ConfigError(f"unknown trace format {self.format!r}; known are {listed}.")
            return self.format
        _, line = next(lines_of(first), (0, ""))
        if not line:
            raise ConfigError(f"{first} holds no workflow.")
        if line.lstrip("\ufeff \t").startswith(("{", "[")):
            row = next(records(first))
            data, where = dict(row.data), row.where
        else:
            where = f"{first}, line 1"
            data = dict.fromkeys(name.strip() for name in line.lstrip("\ufeff").split(","))
        for name, known in FORMATS.items():
            is_table = not line.lstrip("\ufeff \t").startswith(("{", "["))
            if known.is_table == is_table and known.known_by(data):
                return name
        if otherwise:
            return otherwise
        listed = ", ".join(FORMATS)
        raise ConfigError(f"{where} is of no known format; known are {listed}.")

    def workflows(self) -> Iterator[TraceWorkflow]:
        """Yield the trace's workflows, each as soon as it is over.

        Raises:
            ConfigError: it cannot be read, or is wrong; one sentence with file and line.
        """
        known = FORMATS[self.known_format()]
        for path in files_of(self.path):
            rows = table(path) if known.is_table else records(path)
            yield from known.read(rows, self.silence_s, self.block_tokens)


class Writer(Protocol):
    """What workflows are written with."""

    def add(self, workflow: TraceWorkflow) -> None:
        """Write a workflow."""
        ...


Write = Callable[[str], object]
WRITERS: Final[dict[str, Callable[[Write], Writer]]] = {
    "hexgen": RecordedWriter,
    "agentic-mooncake": AgenticWriter,
    "agentic-mooncake-v1": lambda write: AgenticWriter(write, header=False),
    "otel": OtelWriter,
}


def hashed(workflows: Iterable[TraceWorkflow], format_: str) -> Iterator[TraceWorkflow]:
    """Yield ``workflows`` with hashes of blocks, made from what their prompts share.

    Those that have some are passed on. Our own recordings are looked at as a whole.
    """
    whole = list(workflows) if format_ == "hexgen" else None
    ids: dict[tuple[object, ...], int] = {}
    if whole is not None:
        for workflow, spec in zip(whole, specs_of(whole, templates=True), strict=True):
            yield _hashed(workflow, spec, ids)
        return
    for number, workflow in enumerate(workflows):
        (spec,) = specs_of([workflow])
        yield _hashed(workflow, spec, ids, number)


def _hashed(
    workflow: TraceWorkflow,
    spec: WorkflowSpec,
    ids: dict[tuple[object, ...], int],
    number: int | None = None,
) -> TraceWorkflow:
    if workflow.block_tokens and any(call.blocks for call in workflow.calls):
        return workflow
    flat = list(spec.calls())
    workflow.block_tokens, workflow.local = _HASHED_TOKENS, False
    scope = spec.workflow_id if number is None else f"trace-{number}"
    for index, (call, place) in enumerate(zip(workflow.calls, places(workflow), strict=True)):
        keys = _block_keys(flat[place], spec.workflow_id, scope, index)
        call.blocks = tuple(ids.setdefault(key, len(ids)) for key in keys)
    return workflow


def _block_keys(spec: CallSpec, name: str, scope: str, index: int) -> Iterator[tuple[object, ...]]:
    """Yield what each full block of a prompt stands for: equal prompts, equal keys."""
    bounds: list[tuple[int, str]] = []
    end = 0
    for stream, tokens in spec.layers:
        end += tokens
        bounds.append((end, stream.replace(name, scope)))
    behind: tuple[object, ...] = ()
    for block in range(spec.prompt_tokens // _HASHED_TOKENS):
        last = (block + 1) * _HASHED_TOKENS
        within = next((stream for bound, stream in bounds if last <= bound), None)
        if within is None:
            yield "own", scope, index, block
        else:
            behind = tuple((bound, stream) for bound, stream in bounds if bound < last)
            yield within, behind, block


def _traced(spec: WorkflowSpec) -> TraceWorkflow:
    """Return a workflow of ours as one of a trace; what its prompts share is not told."""
    waits = spec.waits()
    calls = [
        TraceCall(call.stage, call.prompt_tokens, call.output_tokens, after=after)
        for call, after in zip(spec.calls(), waits, strict=True)
    ]
    return TraceWorkflow(spec.workflow_id, spec.type, calls, None, spec.tenant)
