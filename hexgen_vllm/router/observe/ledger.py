"""The book of calls: every call that came in was answered, failed for a reason, or is open.

Beside it stands what became of workflows: on time, late or failed, since the start and over recent
minutes. Of names that clients choose only so many are told apart. A workflow is on time when its
last call ended before its deadline, and failed when that call was not answered. It ends when its
client says so, or after a long silence; the moment that counts is always that of its last call.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Final

from hexgen_vllm.policy.workflow import WorkflowRun
from hexgen_vllm.router.errors import Outcome

OTHER: Final = "other"
AGAIN: Final = 5
"""Times that a name must come before it can take the place of one that comes no more."""
IDLE_USES: Final = 1024
"""Uses of all names after which one that was not among them may lose its place."""
_WAITING: Final = 1024  # names without a place that are remembered
CLAIMS: Final = ("class", "deadline", "priority", "tenant")
MIGRATIONS: Final = ("continued", "closed", "impossible", "limit", "late", "no-engine")
"""What becomes of streams whose engine failed: another one went on; only the last events were
missing; the call or its engine does not allow it; too often before; the deadline has passed; none
took it."""
PREFILLS: Final = ("done", "failed", "declined")
"""What becomes of prompts at prefill engines: ``declined`` where the engine or the request itself
would not have it so, and the call's own engine computes the prompt."""

KV_BATCHES: Final = ("taken", "replayed", "lost", "restart", "bad")
"""What becomes of batches of KV events: taken in; these had to be asked for again; never came;
began to count anew, as the engine did; could not be read."""
GONE: Final = "gone"
"""Stands for all engines that have left, of which there may be any number."""
ON_TIME: Final = "on-time"
LATE: Final = "late"
FAILED: Final = "failed"
MAX_TYPES: Final = 64
PERIOD_S: Final = 15.0
PERIODS: Final = 60  # 15 minutes


class BoundedNames:
    """Tells ``most`` names apart; all others are :data:`OTHER`.

    The first ones have a place at once. Later ones get that of a name which has not come for
    long, if they come again and again: names that are made up call by call never do, and those
    that were in use before the junk keep their places.

    Args:
        most: names told apart.
        dropped: is told of a name that lost its place, to count its past among the others.
    """

    __slots__ = ("_dropped", "_last", "_most", "_uses", "_waiting")

    def __init__(self, most: int, dropped: Callable[[str], None]) -> None:
        self._most, self._dropped = most, dropped
        self._uses = 0
        self._last: dict[str, int] = {}
        self._waiting: OrderedDict[str, int] = OrderedDict()

    def __call__(self, name: str) -> str:
        """Return ``name`` if it is one of those that are told apart."""
        self._uses += 1
        if name not in self._last and not self._enters(name):
            return OTHER
        self._last[name] = self._uses
        return name

    def _enters(self, name: str) -> bool:
        if len(self._last) < self._most:
            return True
        times = self._waiting.pop(name, 0) + 1
        if times >= AGAIN:
            oldest = min(self._last, key=self._last.__getitem__)
            if self._uses - self._last[oldest] > IDLE_USES:
                del self._last[oldest]
                self._dropped(oldest)
                return True
        self._waiting[name] = times
        if len(self._waiting) > _WAITING:
            self._waiting.popitem(last=False)
        return False


class Ledger:
    """Counts of calls, by endpoint name and outcome.

    Attributes:
        arrived: calls that came in, by endpoint.
        ended: calls that ended, by endpoint and outcome.
        retries: times a call was sent again, by reason.
        migrations: streams whose engine failed, by what became of them, where they may migrate.
        prefills: prompts at prefill engines, by what became of them.
        kv_events: batches of KV events, by what became of them.
        placements: times a call was placed, by engine and the policy's reason.
        overdue: calls answered after they were due.
        clamped: claims of clients beyond their ceiling, by what was claimed.
    """

    def __init__(self) -> None:
        self.arrived: Counter[str] = Counter()
        self.ended: Counter[tuple[str, str]] = Counter()
        self.retries: Counter[str] = Counter()
        self.migrations = Counter(dict.fromkeys(MIGRATIONS, 0))
        self.prefills = Counter(dict.fromkeys(PREFILLS, 0))
        self.kv_events = Counter(dict.fromkeys(KV_BATCHES, 0))
        self.placements: Counter[tuple[str, str]] = Counter()
        self.overdue = 0
        self.clamped = Counter(dict.fromkeys(CLAIMS, 0))

    @property
    def open(self) -> int:
        """Calls that have not ended."""
        return self.arrived.total() - self.ended.total()

    def engine_left(self, name: str) -> None:
        """Count the placements on an engine among those of all that have left."""
        for engine, reason in [key for key in self.placements if key[0] == name]:
            self.placements[GONE, reason] += self.placements.pop((engine, reason))

    def answered(self) -> int:
        """Return the calls that were answered in full."""
        return sum(n for (_, outcome), n in self.ended.items() if outcome == Outcome.ANSWERED)

    def failed(self) -> dict[str, int]:
        """Return the calls that failed, by reason."""
        found: Counter[str] = Counter()
        for (_, outcome), n in self.ended.items():
            if outcome != Outcome.ANSWERED:
                found[outcome] += n
        return dict(found)


OUTCOMES: Final = (ON_TIME, LATE, FAILED)


class Outcomes:
    """Counts of workflows that ended, by type and outcome.

    Attributes:
        ended: since the start; of types :data:`MAX_TYPES` are told apart.
        on_forget: is told of a type that is no longer told apart.
    """

    def __init__(self) -> None:
        self.ended: Counter[tuple[str, str]] = Counter()
        self.on_forget: Callable[[str], None] | None = None
        self._type = BoundedNames(MAX_TYPES, self._forget_type)
        self._periods: dict[int, Counter[tuple[str, str]]] = {}
        self._seen = {"default"}  # types that are shown, of names that are told apart

    def begun(self, workflow_type: str) -> str | None:
        """Note a type before the end of its first workflow: counters begin at 0 for Prometheus.

        Returns:
            The name that it counts under, ``None`` if that was noted before.
        """
        if workflow_type in self._seen:
            return None
        name = self._type(workflow_type)
        self._seen.add(name)
        return name

    def _forget_type(self, name: str) -> None:
        """Count the workflows of a type among the others."""
        self._seen.discard(name)
        for what in OUTCOMES:
            if n := self.ended.pop((name, what), 0):
                self.ended[OTHER, what] += n
        if self.on_forget is not None:
            self.on_forget(name)

    def add(self, run: WorkflowRun) -> str:
        """Count a workflow that ended, and return the type it counts under."""
        key = self._type(run.workflow_type), outcome(run)
        self._seen.add(key[0])
        self.ended[key] += 1
        period = int(run.last_seen_s // PERIOD_S)
        if period not in self._periods:
            self._periods[period] = Counter()
            self._forget_before(max(self._periods) - PERIODS)
        if period in self._periods:
            self._periods[period][key] += 1
        return key[0]

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
