"""Reader of the public trace format of text-to-SQL workflows.

A trace is a JSON list of ``{"Text2SQLRequest": [{"step", "input_length", "output_length"}, ...]}``.
Candidates that follow each other run in parallel, and so do evaluations; everything else runs in
sequence. The format holds lengths only; which prompt tokens calls share is inferred from them.
Filled in are the stage's template
at its known size, one schema for the whole recording, as long as its shortest prompt with a
schema allows, and for each workflow and template what its shortest prompt leaves after the least
that belongs to one call alone. Stages that are not known share nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Final, NamedTuple

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.sim.workloads.text2sql import (
    EVIDENCE,
    OWN,
    TEMPLATES,
    TYPE,
    WITH_SCHEMA,
)
from hexgen_vllm.sim.workloads.workload import (
    CallGroup,
    CallSpec,
    Layer,
    WorkflowSpec,
    generator,
    renamed,
    workflow_stream,
)
from hexgen_vllm.wire import from_json

SCHEMA_STREAM: Final = "schema:recorded"
CANDIDATES: Final = ("generate_candidate/a", "generate_candidate/b")
ENTRY_KEY: Final = "Text2SQLRequest"
PARALLEL: Final = frozenset({"generate_candidate", "evaluate"})
MAX_TOKENS: Final = 10_000_000
_NOT_IN_NAMES = re.compile(r"[^a-z0-9]+")


def layered(specs: Iterable[WorkflowSpec]) -> tuple[WorkflowSpec, ...]:
    """Return ``specs`` with the layers of every prompt filled in."""
    listed = tuple(specs)
    schema = min((r for spec in listed for r in _schema_rests(spec)), default=0)
    return tuple(_layered(spec, max(schema, 0)) for spec in listed)


def _schema_rests(spec: WorkflowSpec) -> Iterable[int]:
    """Yield how long a schema each prompt that has one can hold."""
    templates = _templates(spec)
    for call in spec.calls():
        name = templates.get(call)
        if name in WITH_SCHEMA:
            yield call.prompt_tokens - TEMPLATES[name] - EVIDENCE.at(0) - OWN[name].at(0)


def _templates(spec: WorkflowSpec) -> dict[CallSpec, str]:
    """Return the template of every call whose prompt is longer than a known one of its stage."""
    longest = max(
        (c.prompt_tokens for c in spec.calls() if c.stage == "generate_candidate"), default=0
    )
    named = {call: _template(call, longest) for call in spec.calls()}
    return {
        call: name
        for call, name in named.items()
        if TEMPLATES.get(name, call.prompt_tokens) < call.prompt_tokens
    }


def _template(call: CallSpec, longest_candidate: int) -> str:
    """Return the template's name; candidates share all but the template, so lengths tell them."""
    if call.stage != "generate_candidate":
        return call.stage
    long, short = CANDIDATES
    between = (TEMPLATES[long] - TEMPLATES[short]) / 2
    is_long = longest_candidate > TEMPLATES[long]
    return long if is_long and call.prompt_tokens > longest_candidate - between else short


def _layered(spec: WorkflowSpec, schema: int) -> WorkflowSpec:
    templates = _templates(spec)
    shared: dict[str, int] = {}
    for call, name in templates.items():
        rest = call.prompt_tokens - TEMPLATES[name] - OWN[name].at(0)
        rest -= schema if name in WITH_SCHEMA else 0
        shared[name] = max(min(rest, shared.get(name, rest)), 0)

    def filled(call: CallSpec) -> CallSpec:
        name = templates.get(call)
        if name is None:
            return call
        layers = (
            Layer(f"template:{name}", TEMPLATES[name]),
            Layer(SCHEMA_STREAM, schema if name in WITH_SCHEMA else 0),
            Layer(workflow_stream(spec.workflow_id), shared[name]),
        )
        return replace(call, layers=tuple(layer for layer in layers if layer.tokens))

    return replace(spec, stages=tuple(tuple(map(filled, group)) for group in spec.stages))


class _Step(NamedTuple):
    """One entry of a trace."""

    stage: str
    prompt_tokens: int
    output_tokens: int


def read_trace(path: str | Path) -> tuple[WorkflowSpec, ...]:
    """Read the workflows of a trace file, all arriving at 0.

    Raises:
        ConfigError: the file cannot be read or is not a trace; names file, entry and key.
    """
    try:
        data = from_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}.") from None
    return parse_trace(data, str(path))


def parse_trace(data: object, name: str) -> tuple[WorkflowSpec, ...]:
    """Return the workflows of a decoded trace; ``name`` is what errors call it.

    Raises:
        ConfigError: it is not a trace; names entry and key.
    """
    if not isinstance(data, list) or not data:
        raise ConfigError(f"{name} must hold a JSON list with at least one entry.")
    entries = [_steps(entry, f"{name}, entry {i}") for i, entry in enumerate(data, 1)]
    return tuple(layered(_plain(f"{TYPE}-trace-{i}", steps) for i, steps in enumerate(entries)))


def resample(specs: Sequence[WorkflowSpec], count: int, *, seed: int) -> tuple[WorkflowSpec, ...]:
    """Draw ``count`` workflows with replacement; each copy has an id and contents of its own."""
    rng = generator(seed, "trace")
    return tuple(renamed(rng.choice(specs), f"{TYPE}-{seed}-{index}") for index in range(count))


def stage_name(step: str) -> str:
    """Return the stage that a trace's step belongs to, "" when the step has no letter or digit.

    >>> stage_name("Information Retriever"), stage_name("generate_candidate_llama-agent")
    ('information_retriever', 'generate_candidate')
    """
    name = _NOT_IN_NAMES.sub("_", step.lower()).strip("_")[:64]
    return next((stage for stage in PARALLEL if name.startswith(stage)), name)


def _steps(entry: object, where: str) -> list[_Step]:
    steps = entry.get(ENTRY_KEY) if isinstance(entry, dict) else None
    if not isinstance(steps, list) or not steps:
        raise ConfigError(f'{where}: "{ENTRY_KEY}" must be a list with at least one step.')
    return [_step(step, f"{where}, step {i}") for i, step in enumerate(steps, 1)]


def _step(step: object, where: str) -> _Step:
    if not isinstance(step, dict):
        raise ConfigError(f"{where} must be a JSON object.")
    name = step.get("step")
    stage = stage_name(name) if isinstance(name, str) else ""
    if not stage:
        raise ConfigError(f'{where}: "step" must be the name of a stage, not {name!r}.')
    return _Step(stage, _length(step, "input_length", where), _length(step, "output_length", where))


def _length(step: dict[str, object], key: str, where: str) -> int:
    value = step.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_TOKENS:
        raise ConfigError(
            f'{where}: "{key}" must be a whole number from 1 to {MAX_TOKENS}, not {value!r}.'
        )
    return value


def _plain(workflow_id: str, steps: list[_Step]) -> WorkflowSpec:
    """Return the workflow of ``steps`` with prompts that share nothing."""
    groups: list[CallGroup] = []
    for stage, run in groupby(steps, key=lambda step: step.stage):
        calls = tuple(CallSpec(*step) for step in run)
        groups.extend([calls] if stage in PARALLEL else ((call,) for call in calls))
    return WorkflowSpec(workflow_id, TYPE, tuple(groups))
