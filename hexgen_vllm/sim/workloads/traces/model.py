"""Workflows as traces have them: lengths, timings, who waits for whom, hashes of prompt blocks.

Times are seconds; moments count from any one that the whole trace shares. Lengths are tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

from hexgen_vllm.errors import ConfigError

SILENCE_S: Final = 600.0
"""A workflow of which nothing was heard for so long is over, unless told otherwise."""
_MOST_OPEN: Final = 20_000


@dataclass(slots=True)
class TraceCall:
    """One answered call.

    Attributes:
        stage: what it is for.
        prompt, output: lengths.
        start_s, end_s: when it was sent and answered, ``None`` when the trace does not say.
        blocks: hashes of the prompt's blocks, first block first; may end before the prompt does.
        cached: of the prompt, what a prefix cache had; ``None`` when the trace does not say.
        after: calls of the workflow that it waits for, by their place in it, all before its own.
        think_s: from the end of the last of them to its sending.
        thread: which of the workflow's agents sent it; its prompts are one growing transcript.
        path: what ``blocks`` come to within the workflow, in their place: streams and tokens.
    """

    stage: str
    prompt: int
    output: int
    start_s: float | None = None
    end_s: float | None = None
    blocks: tuple[int, ...] = ()
    cached: int | None = None
    after: tuple[int, ...] = ()
    think_s: float = 0.0
    thread: str = ""
    path: list[tuple[int, int]] | None = None


@dataclass(slots=True)
class TraceWorkflow:
    """One workflow that is over.

    Attributes:
        name: as the trace has it; not always unique.
        type: the kind of workflow.
        calls: at least one; none waits for a later one.
        arrived_s: when it began, ``None`` when the trace does not say.
        tenant: who sent it.
        block_tokens: tokens of one hashed block, 0 when there are no hashes.
        local: whether hashes are equal to those of other workflows by chance only.
        deadline_s, latency_s: from its arrival, ``None`` when the trace does not say.
    """

    name: str
    type: str
    calls: list[TraceCall] = field(default_factory=list)
    arrived_s: float | None = None
    tenant: str = "default"
    block_tokens: int = 0
    local: bool = False
    deadline_s: float | None = None
    latency_s: float | None = None


class Open:
    """Workflows of which more may come, by key.

    Args:
        silence_s: seconds after which a workflow is over.
    """

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._found: OrderedDict[str, tuple[TraceWorkflow, float]] = OrderedDict()
        self.newest_s = 0.0

    def get(self, key: str) -> TraceWorkflow | None:
        """Return the workflow of ``key`` that is open."""
        found = self._found.get(key)
        return None if found is None else found[0]

    def over(self, key: str, at_s: float) -> Iterator[TraceWorkflow]:
        """Remove and yield what is over when a call of ``key`` is sent at ``at_s``."""
        self.newest_s = max(self.newest_s, at_s)
        known = self._found.get(key)
        if known is not None and at_s - known[1] > self._silence_s:
            yield self._found.pop(key)[0]
        while self._found:
            name, (workflow, last_s) = next(iter(self._found.items()))
            if self.newest_s - last_s <= self._silence_s and len(self._found) < _MOST_OPEN:
                return
            del self._found[name]
            yield workflow

    def keep(self, key: str, workflow: TraceWorkflow, last_s: float) -> None:
        """Keep a workflow that was last heard of at ``last_s``."""
        self._found[key] = workflow, last_s
        self._found.move_to_end(key)

    def join(self, key: str, other: str) -> None:
        """Let calls of ``other`` be calls of ``key``'s workflow from here on."""
        workflow, last_s = self._found[key]
        joined, joined_s = self._found.pop(other)
        shift = len(workflow.calls)
        for call in joined.calls:
            call.after = tuple(index + shift for index in call.after)
        workflow.calls.extend(joined.calls)
        self.keep(key, workflow, max(last_s, joined_s))

    def rest(self) -> Iterator[TraceWorkflow]:
        """Remove and yield all that is left."""
        while self._found:
            yield self._found.popitem(last=False)[1][0]


def in_order(workflow: TraceWorkflow, where: str) -> TraceWorkflow:
    """Return ``workflow`` with every call behind those that it waits for, else as it is.

    Raises:
        ConfigError: calls wait for each other in a circle.
    """
    calls = workflow.calls
    if all(index > before for index, call in enumerate(calls) for before in call.after):
        return workflow
    missing = [len(set(call.after)) for call in calls]
    followers: list[list[int]] = [[] for _ in calls]
    for index, call in enumerate(calls):
        for before in set(call.after):
            followers[before].append(index)
    order = [index for index, count in enumerate(missing) if not count]
    for index in order:  # grows as it goes
        for follower in followers[index]:
            missing[follower] -= 1
            if not missing[follower]:
                order.append(follower)
    if len(order) < len(calls):
        raise ConfigError(f"{where}: calls of {workflow.name} wait for each other in a circle.")
    place = {index: at for at, index in enumerate(order)}
    for call in calls:
        call.after = tuple(sorted({place[before] for before in call.after}))
    workflow.calls = [calls[index] for index in order]
    return workflow


def timed_after(calls: Sequence[TraceCall], members: Sequence[int]) -> None:
    """Let each of ``members`` wait for those that ended before it began.

    Of these only for the last ones: a call that ended before another of them began is waited for
    already. All must have a start and an end.
    """
    spans = sorted(
        (calls[index].end_s or 0.0, calls[index].start_s or 0.0, index) for index in members
    )
    ends = [end_s for end_s, _, _ in spans]
    latest = list(accumulate((start_s for _, start_s, _ in spans), max))
    for index in members:
        start_s = calls[index].start_s or 0.0
        count = bisect_right(ends, start_s)
        while count and spans[count - 1][1] == start_s:  # calls without length, at that moment
            count -= 1
        floor_s = latest[count - 1] if count else 0.0
        found: list[int] = []
        while count and (ends[count - 1] > floor_s or not found):
            found.append(spans[count - 1][2])
            count -= 1
        calls[index].after = tuple(sorted(found))


def link(workflow: TraceWorkflow, parents: Mapping[str, str] | None = None) -> TraceWorkflow:
    """Say of each call what it waits for, from threads and times.

    Calls of a thread follow each other unless they overlap. The first calls of a child thread wait
    for the call of the parent that had ended last when it began; the parent's first call after the
    child's end waits for the child. What is left between is think time.

    Args:
        workflow: all its calls have a start and an end; they are sorted by their start.
        parents: thread by which a thread was started, for those that were.
    """
    calls = workflow.calls = sorted(
        workflow.calls, key=lambda c: (c.start_s or 0.0, c.end_s or 0.0)
    )
    threads: dict[str, list[int]] = {}
    for index, call in enumerate(calls):
        threads.setdefault(call.thread, []).append(index)
    for members in threads.values():
        timed_after(calls, members)
    for child, parent in (parents or {}).items():
        if child in threads and parent in threads and child != parent:
            _spawn_and_join(calls, threads[child], threads[parent])
    for call in calls:
        ends = [calls[index].end_s or 0.0 for index in call.after]
        began = workflow.arrived_s if workflow.arrived_s is not None else calls[0].start_s
        call.think_s = max((call.start_s or 0.0) - max(ends, default=began or 0.0), 0.0)
    return workflow


def _spawn_and_join(calls: list[TraceCall], child: list[int], parent: list[int]) -> None:
    began_s = calls[child[0]].start_s or 0.0
    ended_s = max(calls[index].end_s or 0.0 for index in child)
    before = [index for index in parent if (calls[index].end_s or 0.0) <= began_s]
    if before:
        spawn = max(before, key=lambda index: calls[index].end_s or 0.0)
        for index in child:
            if not calls[index].after:
                calls[index].after = (spawn,)
    last = [index for index in child if (calls[index].end_s or 0.0) == ended_s]
    for index in parent:
        if (calls[index].start_s or 0.0) >= ended_s:
            calls[index].after = tuple(sorted({*calls[index].after, *last}))
            return
