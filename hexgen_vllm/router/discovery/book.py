"""What discovery did, for metrics and diagnostics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

DNS: Final = "dns"
KUBERNETES: Final = "kubernetes"

OK: Final = "ok"
EMPTY: Final = "empty"
PARTIAL: Final = "partial"
JOINED: Final = "joined"
DRAINED: Final = "drained"
RETURNED: Final = "returned"
ANSWERS: Final = (OK, EMPTY, PARTIAL)
CHANGES: Final = (JOINED, DRAINED, RETURNED)


@dataclass(slots=True)
class SourceBook:
    """Counts of one source: a DNS service, or the pods of a selector.

    Attributes:
        kind: :data:`DNS` or :data:`KUBERNETES`.
        what: what is asked for, as options give it.
        began_s: when it was first asked.
        lookups: how often it was asked, by outcome.
        changes: how often engines joined, were drained, and returned before they were gone.
        wanted: engines that it names now.
        last: outcome of the last time.
        answered_s: when it last gave an answer, ``None`` if it never did.
    """

    kind: str
    what: str
    began_s: float
    lookups: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    wanted: int = 0
    last: str = ""
    answered_s: float | None = None

    def asked(self, outcome: str, now: float) -> bool:
        """Count a time that the source was asked; return whether the outcome is a new one."""
        new, self.last = outcome != self.last, outcome
        self.lookups[outcome] += 1
        if outcome in ANSWERS:
            self.answered_s = now
        return new

    def age_s(self, now: float) -> float:
        """Return the seconds since the last answer, or since the begin if there was none."""
        return now - (self.began_s if self.answered_s is None else self.answered_s)

    def view(self, now: float) -> dict[str, Any]:
        """Return what diagnostics show."""
        return {
            "source": self.kind,
            "what": self.what,
            "engines": self.wanted,
            "last": self.last or None,
            "age_s": round(self.age_s(now), 3),
            "lookups": dict(self.lookups),
            "changes": dict(self.changes),
        }
