"""Workflows that have begun and not ended."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import replace

from hexgen_vllm.policy.exchange import Exchange, WorkflowPart
from hexgen_vllm.policy.shapes import Shapes
from hexgen_vllm.policy.workflow import MAX_CALLS, SeenCall, WorkflowRun
from hexgen_vllm.types import NO_DEADLINE, Call, CallResult


class Workflows:
    """Workflows that have begun and not ended, and the shapes learned from those that have.

    A workflow ends when its client says so, or when nothing was heard of it for ``idle_s``.

    Several coordinators can tell each other of theirs (:meth:`share`, :meth:`changes`,
    :meth:`heard`; see :mod:`hexgen_vllm.policy.exchange`).

    Args:
        shapes: where endings teach.
        idle_s: seconds of silence after which a workflow counts as ended.
        max_open: bound on open workflows. The longest silent one is ended first; if none is
            silent, the one whose last call came first.
    """

    def __init__(self, shapes: Shapes, *, idle_s: float = 600.0, max_open: int = 100_000) -> None:
        self.shapes = shapes
        self._idle_s, self._max_open = idle_s, max_open
        self._open: OrderedDict[str, WorkflowRun] = OrderedDict()  # by their last arrivals
        self._silent: OrderedDict[str, WorkflowRun] = OrderedDict()  # no call in flight, by time
        self._admitted = 0
        self.on_end: Callable[[WorkflowRun], None] | None = None  # told of every ending
        self.on_move: Callable[[WorkflowRun], None] | None = None  # of those gone on elsewhere
        self._exchange = Exchange(shapes, max_open)

    def __len__(self) -> int:
        return len(self._open)

    def get(self, workflow_id: str) -> WorkflowRun | None:
        """Return an open workflow."""
        return self._open.get(workflow_id)

    @property
    def elsewhere(self) -> Collection[str]:
        """Workflows that are open at other coordinators."""
        return self._exchange.elsewhere.keys()

    def inherited(self, call: Call) -> Call:
        """Return a call of a child session with what it has from the top of its tree.

        Its deadline is that of the root if a client asked for one. Where those above wait for it,
        it is a part of the root's workflow: what follows it is what follows there.
        """
        name = call.root
        root = None if name is None else self._open.get(name) or self._exchange.elsewhere.get(name)
        if root is None:
            return call
        waited_for = call.root == call.workflow_id
        if not root.asked:
            return replace(call, workflow_type=root.workflow_type) if waited_for else call
        if waited_for:
            return replace(
                call, workflow_type=root.workflow_type, deadline_s=NO_DEADLINE, stages_left=None
            )
        own_s = call.deadline_s if call.deadline_asked else NO_DEADLINE
        return replace(call, deadline_s=min(own_s, root.deadline_s), deadline_asked=True)

    def arrived(self, call: Call, now: float) -> tuple[WorkflowRun, SeenCall]:
        """Note that ``call`` arrived; opens its workflow when new."""
        run = self._open.get(call.workflow_id) or self._taken_over(call.workflow_id)
        if run is None:
            run = WorkflowRun(call.workflow_id, call.workflow_type, now)
            run.learned_as, run.lone = call.learned_as, call.final
            self._open[call.workflow_id] = run
        self._open.move_to_end(call.workflow_id)
        self._silent.pop(call.workflow_id, None)
        if call.deadline_s != NO_DEADLINE:
            run.deadline_s = call.deadline_s
            run.asked = run.asked or (call.deadline_asked and call.root is None)
        run.last_seen_s, run.turn, run.left = now, run.turn + 1, False
        run.in_flight += 1
        ordinal = run.stage_counts.get(call.stage, 0)
        run.stage_counts[call.stage] = ordinal + 1
        seen = SeenCall(call.stage, ordinal, call.arrived_s, call.prompt_tokens)
        if len(run.calls) < MAX_CALLS:
            run.calls[call.call_id] = seen
        self._exchange.changed(run, call.call_id)
        return run, seen

    def placed(self, run: WorkflowRun, call: Call, engine_id: str) -> None:
        """Note where a call of a workflow went: its engine has the prompt then."""
        run.engine, run.prefix, run.chunk_tokens = engine_id, call.prefix, call.prefix_chunk_tokens
        self._exchange.changed(run, call.call_id)

    def admit(self, run: WorkflowRun, most: int) -> bool:
        """Return whether a workflow may go on, or begin among ``most`` others (0: no limit)."""
        if not run.admitted:
            if 0 < most <= self._admitted:
                return False
            run.admitted = True
            self._admitted += 1
        return True

    def ended(self, call: Call, result: CallResult, now: float) -> None:
        """Note that a call ended; without a full answer of known length it leaves no trace."""
        run = self._open.get(call.workflow_id)
        if run is None:
            return
        run.in_flight = max(run.in_flight - 1, 0)
        run.last_seen_s, run.failed = now, not result.ok
        run.final = run.final or call.final
        if result.ok and result.output_tokens is not None:
            seen = run.calls.get(call.call_id)
            at = None if seen is None else seen.ordinal
            self.shapes.learn_output(call.learned_as, call.stage, result.output_tokens, at)
            if seen is not None:
                seen.ended_s, seen.output_tokens = now, result.output_tokens
                prompt = result.prompt_tokens or seen.prompt_tokens
                seen.uncached_tokens = max(prompt - (result.cached_tokens or 0), 0)
                run.attained += seen.weight()
        else:
            run.calls.pop(call.call_id, None)
        self._exchange.changed(run, call.call_id)
        if run.in_flight:
            return
        if run.over or run.left:
            self._move(run)
        elif run.final:
            self.finished(call.workflow_id)
        else:
            self._silent[call.workflow_id] = run

    def finished(self, workflow_id: str) -> WorkflowRun | None:
        """End a workflow and learn from it; returns it, or ``None`` when it is not open."""
        if workflow_id not in self._open:
            self._taken_over(workflow_id)
        run = self._open.pop(workflow_id, None)
        self._silent.pop(workflow_id, None)
        if run is not None:
            self._admitted -= run.admitted
            self._exchange.ended(run)
            self.shapes.learn(run)
            if self.on_end is not None:
                self.on_end(run)
        return run

    def expire(self, now: float) -> list[WorkflowRun]:
        """End workflows that have been silent too long, or that are too many."""
        ended = []
        while self._open:
            run = next(iter((self._silent or self._open).values()))
            silent = bool(self._silent) and now - run.last_seen_s > self._idle_s
            if not silent and len(self._open) <= self._max_open:
                break
            if run.left and not run.in_flight:
                self._move(run)
                continue
            self.finished(run.workflow_id)
            ended.append(run)
        self._exchange.expire(now - self._idle_s)
        return ended

    # Several coordinators

    def share(self) -> None:
        """Keep from now on what others are to be told; of workflows that are open, all."""
        self._exchange.share(self._open.values())

    def changes(self, most: int) -> list[WorkflowPart]:
        """Return what others have not been told yet, at most of so many workflows."""
        return self._exchange.changes(self._open, most)

    def heard(self, part: WorkflowPart, now: float) -> None:
        """Take in what another coordinator tells; ``now`` is when."""
        run = self._open.get(part.workflow_id)
        if run is not None and part.over and run.started_s > part.last_seen_s:
            run = None  # the name was used again
        before_s = math.inf if run is None else run.last_seen_s
        self._exchange.heard(part, run, now)
        if run is None or run.in_flight:
            return
        if run.over or run.left:
            self._move(run)
        elif run.last_seen_s > before_s:
            self._silent.move_to_end(run.workflow_id)

    def _taken_over(self, workflow_id: str) -> WorkflowRun | None:
        """Go on with a workflow that others know; ``None`` if they know none of that name."""
        run = self._exchange.taken_over(workflow_id)
        if run is not None:
            run.begun = run.admitted = True
            self._admitted += 1
            self._open[workflow_id] = run
        return run

    def _move(self, run: WorkflowRun) -> None:
        """Leave a workflow to others."""
        del self._open[run.workflow_id]
        self._silent.pop(run.workflow_id, None)
        self._admitted -= run.admitted
        run.admitted = False
        self._exchange.left(run)
        if self.on_move is not None:
            self.on_move(run)
