"""Reader of the public trace format of text-to-SQL workflows.

A trace is a JSON list of ``{"Text2SQLRequest": [{"step", "input_length", "output_length"}, ...]}``.
Candidates that follow each other run in parallel, and so do evaluations; everything else runs in
sequence. The format holds lengths only; :mod:`hexgen_vllm.sim.layers` fills in what prompts share.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Final, NamedTuple

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.sim.layers import layered
from hexgen_vllm.sim.text2sql import TYPE
from hexgen_vllm.sim.workload import CallSpec, Group, WorkflowSpec, generator, renamed

ENTRY_KEY: Final = "Text2SQLRequest"
PARALLEL: Final = frozenset({"generate_candidate", "evaluate"})
MAX_TOKENS: Final = 10_000_000

_NOT_IN_NAMES = re.compile(r"[^a-z0-9]+")


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
        data = json.loads(Path(path).read_text(encoding="utf-8"))
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
    groups: list[Group] = []
    for stage, run in groupby(steps, key=lambda step: step.stage):
        calls = tuple(CallSpec(*step) for step in run)
        groups.extend([calls] if stage in PARALLEL else ((call,) for call in calls))
    return WorkflowSpec(workflow_id, TYPE, tuple(groups))
