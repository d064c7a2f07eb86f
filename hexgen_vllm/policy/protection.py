"""Overload rules applied to open calls: who is demoted, who is turned away, who is given up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.policy.calls import Demand
from hexgen_vllm.policy.engine_load import EngineLoad
from hexgen_vllm.policy.estimates import Estimates
from hexgen_vllm.policy.overload import (
    USUAL_WEIGHT,
    demoted_may_go,
    entry_margin,
    least_odds,
    over_bounds,
)
from hexgen_vllm.policy.queue import HeldCalls
from hexgen_vllm.policy.workflow import WorkflowRun
from hexgen_vllm.types import NO_DEADLINE


@dataclass(init=False, slots=True)
class OpenCall:
    """A call that has not ended.

    Attributes:
        demand: its estimates.
        run: its workflow.
        hopeless_after_s: when its workflow cannot be on time any more.
        engine: where it was placed.
        prefiller: which engine is computing its prompt for that one, ``None`` if none is.
        refused_by: engines that failed since the last one that began to answer it.
        moved: one had begun to answer it, so that its end says nothing of how fast the last one is.
    """

    demand: Demand
    run: WorkflowRun
    hopeless_after_s: float
    engine: EngineLoad | None
    prefiller: EngineLoad | None
    refused_by: frozenset[str]
    moved: bool

    def __init__(self, demand: Demand, run: WorkflowRun) -> None:
        self.demand, self.run = demand, run
        self.hopeless_after_s = NO_DEADLINE
        self.engine = self.prefiller = None
        self.refused_by = frozenset()
        self.moved = False


class Protection:
    """Judges open calls; changes only their standing, never whether they are open.

    Args:
        options: limits and margins.
        estimates: of calls.
        held: calls that wait; demoted calls are moved in it.
        open_calls: by id; read.
    """

    def __init__(
        self,
        options: DispatchOptions,
        estimates: Estimates,
        held: HeldCalls,
        open_calls: Mapping[str, OpenCall],
    ) -> None:
        self._options, self._estimates = options, estimates
        self._held, self._open = held, open_calls
        self._usual_tokens = 0.0
        self.enabled = options.overload == "protect" and options.policy == "slack"

    def judge(self, entry: OpenCall, ordinal: int, now: float) -> None:
        """Demote the workflow of a call that just came if it will be late."""
        if not self.enabled or entry.run.background:
            return
        run, call = entry.run, entry.demand.call
        new = len(run.calls) == 1
        odds = self._odds(entry.demand, ordinal, new)
        entry.hopeless_after_s = self._estimates.hopeless_after_s(
            call, run.deadline_s, ordinal, odds
        )
        if now > entry.hopeless_after_s or (new and self._too_slow(entry.demand, ordinal, now)):
            self._demote(run)

    def judge_held(self, first: Iterable[str], now: float) -> bool:
        """Demote the workflows of held calls that became hopeless; return whether any was.

        Args:
            first: the calls that are judged.
            now: the present moment.
        """
        found = False
        if self.enabled:
            for call_id in first:
                entry = self._open[call_id]
                if now > entry.hopeless_after_s and not entry.run.background:
                    self._demote(entry.run)
                    found = True
        return found

    def holds_back(self, entry: OpenCall, engines: Iterable[EngineLoad]) -> bool:
        """Return whether a demoted call waits, though its ``engines`` have room."""
        if not (self.enabled and entry.run.background):
            return False
        demoted = calls = slots = 0
        for engine in engines:
            demoted += engine.demoted
            calls += engine.calls
            slots += engine.slots
        return not demoted_may_go(self._options.background_share, demoted, calls, slots)

    def turns_away(self, entry: OpenCall) -> bool:
        """Return whether a call is refused because its workflow, not begun, would be late.

        Never for want of a deadline that nobody asked for.
        """
        run, call = entry.run, entry.demand.call
        late = self.enabled and run.background and not run.begun
        asked = call.deadline_asked and call.deadline_s != NO_DEADLINE
        return late and asked and self._options.reject_at_entry

    def excess(self) -> str | None:
        """Return the held call to refuse while the queue is too long, ``None`` when it is not.

        Calls of workflows that have begun come last; among others the demoted, then the last due.
        """
        if not over_bounds(self._options, len(self._held), self._held.tokens):
            return None
        first: str | None = None
        for call_id in self._held.last_first():
            if not self._open[call_id].run.begun:
                return call_id
            first = first or call_id
        return first

    def expired(self, now: float) -> list[str]:
        """Return the held calls that have waited longer than they may."""
        most_s = self._options.held_timeout_s
        return self._held.waited_longer(most_s, now) if most_s > 0 else []

    def hold(self, entry: OpenCall, now: float) -> None:
        """Add a call to those that wait for room."""
        demand, background = entry.demand, entry.run.background
        self._held.add(
            demand.call.call_id,
            self._estimates.work_s(demand) if background else demand.due_s,
            now,
            tenant=demand.call.tenant,
            tokens=(demand.call.prompt_tokens, demand.output_tokens),
            priority=demand.call.priority,
            background=background,
            model=demand.call.model,
            own_s=self._estimates.own_s(demand),
        )

    def _odds(self, demand: Demand, ordinal: int, new: bool) -> float:
        left = self._estimates.left_tokens(demand.call, ordinal)
        if new and left:
            usual = self._usual_tokens or left
            self._usual_tokens = usual + USUAL_WEIGHT * (left - usual)
        return least_odds(self._options.hopeless_quantile, left, self._usual_tokens)

    def _too_slow(self, demand: Demand, ordinal: int, now: float) -> bool:
        likely_s = self._estimates.predicted_s(demand, ordinal, self._held.output_tokens)
        margin = entry_margin(self._options.entry_margin, self._estimates.fullness())
        return now + margin * likely_s > demand.deadline_s

    def _demote(self, run: WorkflowRun) -> None:
        """Put a workflow behind the others, with all its calls that are not placed yet."""
        run.background = True
        for call_id in run.calls:
            entry = self._open.get(call_id)
            if entry is None or entry.engine is not None:
                continue
            entry.demand = replace(entry.demand, due_s=NO_DEADLINE)
            if call_id in self._held:
                self._held.demote(call_id, self._estimates.work_s(entry.demand))
