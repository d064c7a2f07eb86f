"""What became of workflows: on time, late or failed, since the start and over recent minutes.

A workflow is on time when its last call ended before its deadline, and failed when that call was
not answered. It ends when its client says so, or after a long silence; the moment that counts is
always that of its last call.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from hexgen_vllm.policy.workflow import WorkflowRun
from hexgen_vllm.router.labels import OTHER, Names

ON_TIME: Final = "on-time"
LATE: Final = "late"
FAILED: Final = "failed"
OUTCOMES: Final = (ON_TIME, LATE, FAILED)
MAX_TYPES: Final = 64
PERIOD_S: Final = 15.0
PERIODS: Final = 60  # 15 minutes


class Outcomes:
    """Counts of workflows that ended, by type and outcome.

    Attributes:
        ended: since the start; of types :data:`MAX_TYPES` are told apart.
    """

    def __init__(self) -> None:
        self.ended: Counter[tuple[str, str]] = Counter()
        self._type = Names(MAX_TYPES, self._forget_type)
        self._periods: dict[int, Counter[tuple[str, str]]] = {}

        self._seen = {"default"}  # types that are shown, of names that are told apart

    def begun(self, workflow_type: str) -> None:
        """Note a type before the end of its first workflow: counters begin at 0 for Prometheus."""
        if workflow_type not in self._seen:
            self._seen.add(self._type(workflow_type))

    def _forget_type(self, name: str) -> None:
        """Count the workflows of a type among the others."""
        self._seen.discard(name)
        for what in OUTCOMES:
            if n := self.ended.pop((name, what), 0):
                self.ended[OTHER, what] += n

    def add(self, run: WorkflowRun) -> None:
        """Count a workflow that ended."""
        key = self._type(run.workflow_type), outcome(run)
        self._seen.add(key[0])
        self.ended[key] += 1
        period = int(run.last_seen_s // PERIOD_S)
        if period not in self._periods:
            self._periods[period] = Counter()
            self._forget_before(max(self._periods) - PERIODS)
        if period in self._periods:
            self._periods[period][key] += 1

    def _forget_before(self, first: int) -> None:
        for period in [p for p in self._periods if p < first]:
            del self._periods[period]

    def totals(self) -> dict[tuple[str, str], int]:
        """Return the counts by type and outcome, also those of which there were none."""
        return {(name, what): self.ended[name, what] for name in self._seen for what in OUTCOMES}

    def periods(self, now: float) -> list[dict[str, int]]:
        """Return counts by outcome in the last :data:`PERIODS` periods, oldest first."""
        last = int(now // PERIOD_S)
        return [self._by_outcome(p) for p in range(last - PERIODS + 1, last + 1)]

    def _by_outcome(self, period: int) -> dict[str, int]:
        found = dict.fromkeys(OUTCOMES, 0)
        for (_, what), n in self._periods.get(period, {}).items():
            found[what] += n
        return found

    def types(self, now: float) -> dict[str, dict[str, int]]:
        """Return counts by type and outcome over the time of :meth:`periods`."""
        first = int(now // PERIOD_S) - PERIODS + 1
        found: dict[str, dict[str, int]] = {}
        for period, counts in self._periods.items():
            if period >= first:
                for (name, what), n in counts.items():
                    found.setdefault(name, dict.fromkeys(OUTCOMES, 0))[what] += n
        return found


def outcome(run: WorkflowRun) -> str:
    """Return what became of a workflow that ended."""
    if run.failed:
        return FAILED
    return ON_TIME if run.last_seen_s <= run.deadline_s else LATE
