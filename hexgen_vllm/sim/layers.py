"""Which prompt tokens recorded text-to-SQL calls share, inferred from their lengths.

A recording says how long prompts were, not what was in them. Filled in are the stage's template
at its known size, one schema for the whole recording, as long as its shortest prompt with a
schema allows, and for each workflow and template what its shortest prompt leaves after the least
that belongs to one call alone. Stages that are not known share nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from hexgen_vllm.sim.text2sql import EVIDENCE, OWN, TEMPLATES, WITH_SCHEMA
from hexgen_vllm.sim.workload import CallSpec, Layer, WorkflowSpec, workflow_stream

SCHEMA_STREAM: Final = "schema:recorded"
CANDIDATES: Final = ("generate_candidate/a", "generate_candidate/b")


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
