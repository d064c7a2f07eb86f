"""From traced workflows to workflows that the simulator plays: who waits for whom, what is shared.

**With hashes of blocks** prompts share what their hashes say. They are put into a tree, one node
for each block behind the same blocks; a path without branches is one stream, so that prompts are a
few layers. A stream that one workflow alone uses is its own: copies of it have other contents.

**Without them**, but with what prefix caches had, in our own format: half of all calls of a stage
found its template, so the template is as long as the median hit; what a call found beyond it is
taken for the workflow's own.

**Without either**, or in other formats: the calls of an agent are one growing transcript. A prompt
begins with that of the call before it as far as the cache had it; where nothing is known of the
cache, wholly if it is longer. What the first call of an agent found is a template that all
workflows of the type have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby
from statistics import median
from typing import Final

from hexgen_vllm.sim.workloads.traces.model import TraceCall, TraceWorkflow
from hexgen_vllm.sim.workloads.workload import (
    CallGroup,
    CallSpec,
    Layer,
    WorkflowSpec,
    recorded_stream,
    workflow_stream,
)

_SHARED: Final = -1
_Path = list[tuple[int, int]]
"""Streams and the tokens of each, from the front of a prompt."""


class PromptTree:
    """Prompts by the hashes of their blocks.

    Attributes:
        owner: of each stream: the workflow that uses it, or -1 when several do.
        uses: of each stream: calls that have it.
    """

    def __init__(self) -> None:
        self._nodes: dict[tuple[int, int], int] = {}
        self._stream: list[int] = [-1]  # of a node; node 0 is the root
        self._tip: list[int] = []  # of a stream: its last node
        self._last: tuple[int, ...] = ()  # blocks of the prompt before, and their nodes
        self._last_nodes: list[int] = []
        self.owner: list[int] = []
        self.uses: list[int] = []

    def add(self, workflow: int, call: TraceCall, block_tokens: int) -> _Path:
        """Return the streams of a call's prompt, and the tokens of each."""
        blocks = call.blocks[: -(-call.prompt // block_tokens)]
        count = _common(self._last, blocks)  # most prompts go on from the one before
        nodes = self._last_nodes[:count]
        node = nodes[-1] if nodes else 0
        for block in blocks[count:]:
            node = self._child(node, block)
            nodes.append(node)
        self._last, self._last_nodes = blocks, nodes
        path = [
            (stream, block_tokens * sum(1 for _ in run))
            for stream, run in groupby(map(self._stream.__getitem__, nodes))
        ]
        over = len(blocks) * block_tokens - call.prompt
        if over > 0:
            path[-1] = path[-1][0], path[-1][1] - over
        for stream, _ in path:
            self.uses[stream] += 1
            if self.owner[stream] != workflow:
                self.owner[stream] = workflow if self.uses[stream] == 1 else _SHARED
        return path

    def _child(self, node: int, block: int) -> int:
        child = self._nodes.get((node, block))
        if child is not None:
            return child
        child = self._nodes[node, block] = len(self._stream)
        stream = self._stream[node]
        if stream < 0 or self._tip[stream] != node:
            stream = len(self._tip)
            self._tip.append(child)
            self.owner.append(_SHARED)
            self.uses.append(0)
        self._tip[stream] = child
        self._stream.append(stream)
        return child


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Return how many first items are equal."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def compact(workflow: TraceWorkflow) -> TraceWorkflow:
    """Return ``workflow`` with short paths for long lists of hashes, where these are local."""
    if workflow.local and workflow.block_tokens:
        tree = PromptTree()
        for call in workflow.calls:
            call.path, call.blocks = tree.add(0, call, workflow.block_tokens), ()
        for call in workflow.calls:
            call.path = _worthwhile(call.path or [], tree)
    return workflow


def specs_of(
    workflows: Sequence[TraceWorkflow], *, templates: bool = False
) -> tuple[WorkflowSpec, ...]:
    """Return ``workflows`` as the simulator plays them; all arrive at 0.

    Args:
        workflows: of one trace; hashes that are local give way to paths.
        templates: calls share their stage's template, not transcripts: our own recordings do.
    """
    tree = PromptTree()
    paths: list[list[_Path] | None] = []
    for index, workflow in enumerate(workflows):
        if workflow.block_tokens > 0 and any(call.blocks for call in workflow.calls):
            compact(workflow)
        if any(call.path is not None for call in workflow.calls):
            paths.append([call.path or [] for call in workflow.calls])
        elif workflow.block_tokens > 0 and any(call.blocks for call in workflow.calls):
            paths.append([tree.add(index, c, workflow.block_tokens) for c in workflow.calls])
        else:
            paths.append(None)
    usual = _templates(workflows) if templates else {}
    found = []
    for index, (workflow, path) in enumerate(zip(workflows, paths, strict=True)):
        name = f"trace-{index}"
        if path is not None:
            within = None if workflow.local else tree
            layers = [_hashed(name, index, one, within) for one in path]
        elif templates:
            layers = [_usual(name, workflow.type, call, usual) for call in workflow.calls]
        else:
            layers = _transcripts(name, workflow)
        found.append(_spec(name, workflow, layers))
    return tuple(found)


def _worthwhile(path: _Path, tree: PromptTree) -> _Path:
    """Return ``path`` without the end that no other call has."""
    return [(stream, tokens) for stream, tokens in path if tree.uses[stream] > 1]


def _hashed(name: str, index: int, path: _Path, tree: PromptTree | None) -> tuple[Layer, ...]:
    """Return the layers of a path; without ``tree`` all its streams are the workflow's own."""
    if tree is None:
        return tuple(Layer(workflow_stream(name, stream), tokens) for stream, tokens in path)
    return tuple(
        Layer(
            workflow_stream(name, stream)
            if tree.owner[stream] == index
            else recorded_stream(stream),
            tokens,
        )
        for stream, tokens in _worthwhile(path, tree)
    )


def _templates(workflows: Iterable[TraceWorkflow]) -> dict[tuple[str, str], int]:
    """Return the length of the template of every (type, stage)."""
    hits: dict[tuple[str, str], list[int]] = {}
    shortest: dict[tuple[str, str], int] = {}
    for workflow in workflows:
        for call in workflow.calls:
            key = workflow.type, call.stage
            hits.setdefault(key, []).append(min(call.cached or 0, call.prompt - 1))
            shortest[key] = min(call.prompt - 1, shortest.get(key, call.prompt))
    return {key: min(round(median(values)), shortest[key]) for key, values in hits.items()}


def _usual(
    name: str, kind: str, call: TraceCall, templates: dict[tuple[str, str], int]
) -> tuple[Layer, ...]:
    template = templates[kind, call.stage]
    own = max(min(call.cached or 0, call.prompt - 1) - template, 0)
    layers = (
        Layer(f"template:{kind}/{call.stage}", template),
        Layer(workflow_stream(name), own),
    )
    return tuple(layer for layer in layers if layer.tokens)


def _transcripts(name: str, workflow: TraceWorkflow) -> list[tuple[Layer, ...]]:
    """Return the layers of every call, by the transcript of its thread."""
    threads: dict[str, list[TraceCall]] = {}
    for call in workflow.calls:
        threads.setdefault(call.thread, []).append(call)
    found: dict[int, tuple[Layer, ...]] = {}
    transcript = 0
    for calls in threads.values():
        shared = [_begins_with(*pair) for pair in zip([None, *calls[:-1]], calls, strict=True)]
        template = shared[0]
        for call, has, later in zip(calls, shared, [*shared[1:], 0], strict=True):
            if has <= template:  # the transcript was begun anew
                transcript += 1
            length = min(max(has, later), call.prompt) - template
            layers = (
                Layer(f"template:{workflow.type}", min(template, call.prompt)),
                Layer(workflow_stream(name, transcript), max(length, 0)),
            )
            found[id(call)] = tuple(layer for layer in layers if layer.tokens)
    return [found[id(call)] for call in workflow.calls]


def _begins_with(before: TraceCall | None, call: TraceCall) -> int:
    """Return what a prompt has in common with that of the call before it in its thread."""
    if call.cached is not None:
        return min(call.cached, call.prompt - 1)
    if before is None or call.prompt <= before.prompt:
        return 0
    return before.prompt


def _depths(calls: Sequence[TraceCall]) -> list[int]:
    """Return how many calls each has before it, on the longest way."""
    depths: list[int] = []
    for call in calls:
        depths.append(1 + max((depths[before] for before in call.after), default=-1))
    return depths


def places(workflow: TraceWorkflow) -> list[int]:
    """Return where each call stands among those of the workflow that is played."""
    depths = _depths(workflow.calls)
    order = sorted(range(len(depths)), key=lambda index: (depths[index], index))
    found = [0] * len(order)
    for at, index in enumerate(order):
        found[index] = at
    return found


def _spec(name: str, workflow: TraceWorkflow, layers: Sequence[tuple[Layer, ...]]) -> WorkflowSpec:
    """Return a workflow in groups: a call is one group behind the last that it waits for."""
    calls, place = workflow.calls, places(workflow)
    order = sorted(range(len(calls)), key=place.__getitem__)
    depths = _depths(calls)
    by_depth: list[list[int]] = [[] for _ in range(max(depths) + 1)]
    for index in order:
        by_depth[depths[index]].append(index)
    bounds = [0, *accumulate(map(len, by_depth))]
    before = [set(range(*bounds[d - 1 : d + 1])) if d else set() for d in range(len(by_depth))]
    plain = all({place[b] for b in calls[i].after} == before[depths[i]] for i in order)

    def spec(index: int) -> CallSpec:
        call = calls[index]
        after = None if plain else tuple(sorted(place[b] for b in call.after))
        return CallSpec(call.stage, call.prompt, call.output, layers[index], call.think_s, after)

    stages: tuple[CallGroup, ...] = tuple(tuple(map(spec, group)) for group in by_depth)
    return WorkflowSpec(name, workflow.type, stages, tenant=workflow.tenant)
