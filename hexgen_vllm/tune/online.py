"""When a running router is tuned, what becomes of a proposal, and when it is taken back.

Decisions only: a driver keeps the recent workflows, runs the search in another process, and turns
the knobs. Times are seconds of the driver's clock, losses as in :mod:`hexgen_vllm.tune.objective`.

    watching ── drift, or the period is over ──► searching ── not convincing ──► watching
        ▲                                           │ gain > spread and > simulator's error
        │                                           ▼
        └── as good as before: keep, else revert ── trying (mode ``auto`` only)
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from hexgen_vllm.option import check, option
from hexgen_vllm.tune.traffic import Live, Traffic, relative
from hexgen_vllm.wire import finite, plain

_HISTORY: Final = 100
EVENTS: Final = ("search", "failed", "keep", "suggest", "apply", "revert", "confirm")
"""What tuning can do."""
_SIGMAS: Final = 2.0
PRESENT: Final = "in force"
"""What the setting in force is called among contenders."""
TUNED: Final = " tuned"
"""What the names of policies end in whose options were found by a search."""


@dataclass(frozen=True)
class OnlineOptions:
    """How a running router is tuned."""

    tune: str = option("off", "tuning on recent traffic", choices=("off", "suggest", "auto"))
    tune_period_s: float = option(1800.0, "longest time between two searches, seconds", least=1.0)
    tune_drift: float = option(
        0.3, "relative change of the traffic that starts a search early", least=0.01
    )
    tune_least_s: float = option(120.0, "shortest time between two searches, seconds", least=0.0)
    tune_workflows: int = option(
        200, "ended workflows that a search, and the judgement of a change, needs", least=16
    )
    tune_ring: int = option(2000, "recent workflows that are kept", least=16)
    tune_simulations: int = option(60, "simulations of a search", least=6)

    def __post_init__(self) -> None:
        check(self)


class TuningPhase(enum.Enum):
    """What the tuner is doing."""

    WATCHING = "watching"
    SEARCHING = "searching"
    TRYING = "trying"


class Action(enum.Enum):
    """What the driver is to do."""

    NOTHING = "nothing"
    APPLY = "apply"
    REVERT = "revert"


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a search found.

    Attributes:
        values: of the knobs.
        loss: simulated, with them.
        present_loss: simulated, with the values in force.
        spread: standard error of the difference.
        policy: another one than that in force which does better, with its best options.
        doubt: what the search itself says against it, ``None`` when nothing.
    """

    values: Mapping[str, float]
    loss: float
    present_loss: float
    spread: float
    policy: str | None = None
    doubt: str | None = None

    @property
    def gain(self) -> float:
        """By how much the loss falls."""
        return self.present_loss - self.loss


@dataclass(frozen=True, slots=True)
class TuningEvent:
    """One line of the history."""

    at_s: float
    what: str
    why: str
    values: Mapping[str, float]
    gain: float | None = None
    spread: float | None = None
    simulator_error: float | None = None


class OnlineTuner:
    """Decides for one router.

    Args:
        options: mode, periods, thresholds.
        values: of the knobs in force.
        now: the present moment.

    Attributes:
        phase: what it is doing.
        values: in force as far as it knows.
        suggested: the last convincing proposal that was not applied.
        suggested_policy: what that is for, ``None`` when it is the policy in force.
        history: the last hundred events, oldest first.
        simulator_error: relative error of the simulated loss of the values in force, ``None``
            before the first search.
        counts: events so far, by what happened.
    """

    def __init__(self, options: OnlineOptions, values: Mapping[str, float], now: float) -> None:
        self._options = options
        self.phase = TuningPhase.WATCHING
        self.values = dict(values)
        self.suggested: dict[str, float] | None = None
        self.suggested_policy: str | None = None
        self.history: deque[TuningEvent] = deque(maxlen=_HISTORY)
        self.simulator_error: float | None = None
        self.counts: dict[str, int] = {}
        self._before: dict[str, float] = {}
        self._live_before = Live(math.nan, math.inf)
        self._traffic: Traffic | None = None
        self._since_s = now
        self._seen_at_apply = 0

    def due(self, traffic: Traffic | None, workflows: int, now: float) -> str | None:
        """Return why a search should start now, ``None`` when it should not.

        Args:
            traffic: recent traffic, ``None`` when there is too little.
            workflows: ended since the start.
            now: the present moment.
        """
        options, waited_s = self._options, now - self._since_s
        idle = options.tune == "off" or self.phase is not TuningPhase.WATCHING or traffic is None
        if idle or workflows < options.tune_workflows or waited_s < options.tune_least_s:
            return None
        if self._traffic is None:
            return "first"
        assert traffic is not None
        if traffic.change_from(self._traffic) > options.tune_drift:
            return "drift"
        return "period" if waited_s >= options.tune_period_s else None

    def search_started(self, traffic: Traffic, why: str, now: float) -> None:
        """Note that a search began."""
        self.phase, self._traffic, self._since_s = TuningPhase.SEARCHING, traffic, now
        self._note(now, "search", why)

    def search_failed(self, why: str, now: float) -> None:
        """Note that a search ended without a result."""
        self.phase, self._since_s = TuningPhase.WATCHING, now
        self._note(now, "failed", why)

    def proposed(self, proposal: Proposal, live: Live, workflows: int, now: float) -> Action:
        """Judge what a search found.

        A gain convinces when the search says nothing against it, when it is more than twice its
        spread and, relative to the loss, more than the error with which the simulator tells the
        loss of the values in force. Another policy is suggested and never applied: it may need
        other engines.

        Args:
            proposal: what was found.
            live: the loss of the values in force, as measured.
            workflows: ended since the start.
            now: the present moment.
        """
        self.phase, self._since_s = TuningPhase.WATCHING, now
        error = relative(proposal.present_loss, live.loss)
        self.simulator_error = error
        why = self._doubt(proposal, error)
        if why is not None:
            self._note(now, "keep", why, proposal)
            return Action.NOTHING
        if self._options.tune != "auto" or proposal.policy is not None:
            self.suggested = dict(proposal.values)
            self.suggested_policy = proposal.policy
            what = "gain" if proposal.policy is None else f"gain of policy {proposal.policy}"
            self._note(now, "suggest", what, proposal)
            return Action.NOTHING
        self._before, self._live_before = self.values, live
        self.values, self._seen_at_apply = dict(proposal.values), workflows
        self.phase = TuningPhase.TRYING
        self._note(now, "apply", "gain", proposal)
        return Action.APPLY

    def fresh(self, workflows: int) -> int:
        """Return how many workflows ended since the last change."""
        return workflows - self._seen_at_apply

    def judge(self, live: Live, workflows: int, now: float) -> Action:
        """Keep or take back a change, once enough workflows have ended under it.

        Args:
            live: the loss of workflows that began after the change.
            workflows: ended since the start.
            now: the present moment.
        """
        if (
            self.phase is not TuningPhase.TRYING
            or self.fresh(workflows) < self._options.tune_workflows
        ):
            return Action.NOTHING
        self.phase, self._since_s = TuningPhase.WATCHING, now
        allowed = _SIGMAS * math.hypot(live.spread, self._live_before.spread)
        worse = live.loss - self._live_before.loss
        if math.isnan(worse) or worse > allowed:
            self.values = self._before
            self._note(now, "revert", f"live loss {live.loss:.4g}")
            return Action.REVERT
        self._note(now, "confirm", f"live loss {live.loss:.4g}")
        return Action.NOTHING

    def _doubt(self, proposal: Proposal, error: float) -> str | None:
        """Return why a proposal does not convince."""
        if proposal.doubt is not None:
            return proposal.doubt
        if dict(proposal.values) == self.values and proposal.policy is None:
            return "nothing better was found"
        if not proposal.gain > _SIGMAS * proposal.spread:
            return "the gain is within its spread"
        if not proposal.gain > error * abs(proposal.present_loss):
            return "the gain is within the simulator's error"
        return None

    def _note(self, now: float, what: str, why: str, proposal: Proposal | None = None) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
        values = self.values if proposal is None else proposal.values
        gain, spread = (None, None) if proposal is None else (proposal.gain, proposal.spread)
        self.history.append(
            TuningEvent(now, what, why, dict(values), gain, spread, self.simulator_error)
        )

    def state(self, now: float) -> dict[str, Any]:
        """Return everything as a JSON object; events have an age, newest first."""
        return {
            "mode": self._options.tune,
            "phase": self.phase.value,
            "values": self.values,
            "suggested": self.suggested,
            "suggested_policy": self.suggested_policy,
            "simulator_error": finite(self.simulator_error),
            "counts": self.counts,
            "history": [_shown(event, now) for event in reversed(self.history)],
        }


def _shown(event: TuningEvent, now: float) -> dict[str, Any]:
    shown = plain(asdict(event))
    del shown["at_s"]
    return {"age_s": round(now - event.at_s, 3), **shown}
