"""What several coordinators tell each other of their workflows."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from hexgen_vllm.policy.shapes import Shapes
from hexgen_vllm.policy.workflow import MAX_CALLS, SeenCall, WorkflowRun

_MAX_ENDED: Final = 4096  # workflows that ended, of which others are to be told


class WorkflowPart(NamedTuple):
    """What one coordinator tells others of a workflow: how it stands, and the calls that changed.

    Attributes:
        workflow_id, workflow_type, learned_as, started_s, last_seen_s, turn, asked,
            asked_s, deadline_s, ordered_by_s, background, engine, prefix, chunk_tokens: as of
            :class:`WorkflowRun`.
        calls: that came or ended since it was told last, by names that no others have.
        gone: calls that failed since: they leave no trace.
        over: it has ended.
    """

    workflow_id: str
    workflow_type: str
    learned_as: str
    started_s: float
    last_seen_s: float
    turn: int
    asked: bool
    asked_s: float
    deadline_s: float
    ordered_by_s: float
    background: bool
    engine: str
    prefix: tuple[int, ...]
    chunk_tokens: int
    calls: dict[str, SeenCall]
    gone: tuple[str, ...]
    over: bool


class Exchange:
    """What others are to be told of this coordinator's workflows, and what they tell of theirs.

    A workflow whose next call comes here goes on here, with its deadline and what it has done.
    What each coordinator knows is the union of all that is told, in whatever order. A workflow is
    open where its last call came, and ends, counts and is logged there; all learn from it.

    Args:
        shapes: where endings at others teach.
        max_elsewhere: bound on workflows known to be open at others; the one heard of first goes.

    Attributes:
        elsewhere: workflows that are open at others, the one heard of first first.
    """

    def __init__(self, shapes: Shapes, max_elsewhere: int) -> None:
        self._shapes, self._max_elsewhere = shapes, max_elsewhere
        self.elsewhere: OrderedDict[str, WorkflowRun] = OrderedDict()
        self._changed: dict[str, set[str]] | None = None  # calls to tell of, by open workflow
        self._gone: deque[WorkflowPart] = deque(maxlen=_MAX_ENDED)  # ended or left, to be told
        self._over: OrderedDict[str, float] = OrderedDict()  # when those ended that are over

    # To others

    def share(self, runs: Iterable[WorkflowRun]) -> None:
        """Keep from now on what others are to be told; of ``runs``, which are open, all."""
        self._changed = {run.workflow_id: set(run.calls) for run in runs if not run.lone}

    def changed(self, run: WorkflowRun, call_id: str) -> None:
        """Note that a call of an open workflow came, was placed or ended."""
        if self._changed is not None and not run.lone:
            self._changed.setdefault(run.workflow_id, set()).add(call_id)

    def ended(self, run: WorkflowRun) -> None:
        """Note that a workflow ended here."""
        if self._changed is None:
            return
        if not run.lone:
            self._remember_over(run.workflow_id, run.last_seen_s)
        calls = set(run.calls) if run.lone else self._changed.pop(run.workflow_id, set())
        if calls or not run.lone:
            self._gone.append(_part(run, calls, over=True))

    def left(self, run: WorkflowRun) -> None:
        """Note that a workflow goes on, or ended, at another."""
        changed = None if self._changed is None else self._changed.pop(run.workflow_id, None)
        if changed and not run.over:
            self._gone.append(_part(run, changed))  # what ended here, others need to know
        self._keep(run)

    def changes(self, runs: Mapping[str, WorkflowRun], most: int) -> list[WorkflowPart]:
        """Return what others have not been told yet, at most of so many workflows.

        Of workflows that ended the last few thousand are kept for telling. Nothing changes what
        was returned.

        Args:
            runs: the open workflows, by id.
            most: how many.
        """
        found: list[WorkflowPart] = []
        while self._gone and len(found) < most:
            found.append(self._gone.popleft())
        changed = self._changed
        while changed and len(found) < most:
            workflow_id = next(iter(changed))
            found.append(_part(runs[workflow_id], changed.pop(workflow_id)))
        return found

    # From others

    def heard(self, part: WorkflowPart, run: WorkflowRun | None, now: float) -> None:
        """Take in what another coordinator tells.

        Args:
            part: what it tells.
            run: the workflow, if it is open here.
            now: the present moment.
        """
        known = run or self.elsewhere.get(part.workflow_id)
        late = known is None and part.started_s <= self._over.get(part.workflow_id, -math.inf)
        if known is None:
            known = WorkflowRun(part.workflow_id, part.workflow_type, part.started_s)
            known.learned_as = part.learned_as
        later = (part.turn, part.last_seen_s) > (known.turn, known.last_seen_s)
        self._merge(known, part)
        known.left = known.left or later
        known.elsewhere_s = max(known.elsewhere_s, min(part.last_seen_s, now))
        if part.over:
            known.over = True
            if not late:
                self._shapes.learn(known)
                self._remember_over(part.workflow_id, part.last_seen_s)
        if run is None and not late:  # one that is late taught its lengths; nothing goes on
            self._keep(known)

    def taken_over(self, workflow_id: str) -> WorkflowRun | None:
        """Return a workflow that is to go on here; ``None`` if others know none of that name."""
        return self.elsewhere.pop(workflow_id, None)

    def expire(self, since_s: float) -> None:
        """Forget workflows of which others have not told since ``since_s``."""
        while self.elsewhere:
            workflow_id, run = next(iter(self.elsewhere.items()))
            if run.elsewhere_s >= since_s:
                break
            del self.elsewhere[workflow_id]

    def _remember_over(self, workflow_id: str, at_s: float) -> None:
        """Note an ending: messages that were under way then begin no workflow."""
        self._over[workflow_id] = max(at_s, self._over.pop(workflow_id, at_s))
        if len(self._over) > _MAX_ENDED:
            self._over.popitem(last=False)

    def _keep(self, run: WorkflowRun) -> None:
        self.elsewhere.pop(run.workflow_id, None)
        if not run.over:
            self.elsewhere[run.workflow_id] = run
            if len(self.elsewhere) > self._max_elsewhere:
                self.elsewhere.popitem(last=False)

    def _merge(self, run: WorkflowRun, part: WorkflowPart) -> None:
        run.started_s, run.turn = min(run.started_s, part.started_s), max(run.turn, part.turn)
        run.asked = run.asked or part.asked
        if part.asked_s > run.asked_s:
            run.asked_s, run.deadline_s = part.asked_s, part.deadline_s
            run.ordered_by_s = part.ordered_by_s
        elif part.asked_s == run.asked_s:
            run.deadline_s = min(run.deadline_s, part.deadline_s)
            run.ordered_by_s = min(run.ordered_by_s, part.ordered_by_s)
        if part.last_seen_s > run.last_seen_s and run.in_flight == 0:
            run.background, run.last_seen_s = part.background, part.last_seen_s
        if part.engine:
            run.engine, run.prefix, run.chunk_tokens = part.engine, part.prefix, part.chunk_tokens
        for name, told in part.calls.items():
            seen = run.calls.get(name)
            if seen is None:
                if len(run.calls) >= MAX_CALLS:
                    continue
                run.calls[name] = told
                run.stage_counts[told.stage] = run.stage_counts.get(told.stage, 0) + 1
            elif seen.ended_s is None and told.ended_s is not None:
                run.calls[name] = told
            else:
                continue
            if told.ended_s is not None:
                run.attained += told.weight()
                self._shapes.learn_output(
                    run.learned_as, told.stage, told.output_tokens, told.ordinal
                )
        for name in part.gone:
            run.calls.pop(name, None)


def _part(run: WorkflowRun, changed: set[str], *, over: bool = False) -> WorkflowPart:
    """Return what is to be told of a workflow; calls are copied, as they go on changing."""
    return WorkflowPart(
        run.workflow_id,
        run.workflow_type,
        run.learned_as,
        run.started_s,
        run.last_seen_s,
        run.turn,
        run.asked,
        run.asked_s,
        run.deadline_s,
        run.ordered_by_s,
        run.background,
        run.engine,
        run.prefix,
        run.chunk_tokens,
        {name: run.calls[name].copied() for name in changed if name in run.calls},
        tuple(name for name in changed if name not in run.calls),
        over,
    )
