"""The engines that a source of discovery names: they join, are drained, and are counted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from hexgen_vllm.router.addresses import AllowedHosts
from hexgen_vllm.router.engines.fleet import Engine, Fleet
from hexgen_vllm.router.engines.health import Watchers
from hexgen_vllm.router.options import Worker

DNS: Final = "dns"
KUBERNETES: Final = "kubernetes"
OK: Final = "ok"
EMPTY: Final = "empty"
PARTIAL: Final = "partial"
JOINED: Final = "joined"
DRAINED: Final = "drained"
RETURNED: Final = "returned"
_LOG = logging.getLogger(__name__)
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


class Members:
    """The engines of one source. Those that others brought are left alone.

    An engine that an operator removed stays away until its source has forgotten it, too.

    Args:
        fleet: the engines there are.
        watchers: take engines in and let them leave.
        book: counts changes.
        hosts: where engines may be; ``None`` for anywhere that the source says.
    """

    def __init__(
        self, fleet: Fleet, watchers: Watchers, book: SourceBook, hosts: AllowedHosts | None
    ) -> None:
        self._fleet, self._watchers, self._book = fleet, watchers, book
        self._hosts = hosts
        self._wanted: frozenset[Worker] = frozenset()
        self._refused: frozenset[Worker] = frozenset()
        self._mine: set[Worker] = set()
        self._left: dict[Worker, bool] = {}  # and whether an operator had drained it before

    def want(self, workers: Iterable[Worker]) -> None:
        """Have these engines and no others; those on hosts that are not allowed are left out."""
        named = frozenset(workers)
        self._wanted = frozenset(worker for worker in named if self._allowed(worker))
        self._refuse(named - self._wanted)
        self._book.wanted = len(self._wanted)
        for worker in sorted(self._mine - self._wanted):
            self._leave(worker)
        self.retry()

    def retry(self) -> None:
        """Take in engines that are wanted and for which there was no place yet."""
        self._left = {w: drained for w, drained in self._left.items() if self._engine(w)}
        for worker in sorted(self._wanted - self._mine):
            if self._join(worker):
                self._mine.add(worker)

    def _join(self, worker: Worker) -> bool:
        engine = self._engine(worker)
        if engine is not None and worker in self._left:
            self._take_back(engine)
            return True
        if worker.name in self._fleet.engines or self._elsewhere(worker.url):
            return False
        self._watchers.expect(worker)
        self._note(JOINED, worker)
        return True

    def _take_back(self, engine: Engine) -> None:
        """Give calls again to an engine that was leaving, unless an operator said otherwise."""
        engine.leaving = False
        self._fleet.drain(engine.name, self._left.pop(engine.worker))
        self._note(RETURNED, engine.worker)

    def _leave(self, worker: Worker) -> None:
        self._mine.discard(worker)
        engine = self._engine(worker)
        if engine is not None:
            self._left[worker] = engine.draining and not engine.leaving
            self._note(DRAINED, worker)
            self._watchers.retire(worker.name, f"no longer named by {self._book.kind}")

    def _note(self, what: str, worker: Worker) -> None:
        self._book.changes[what] += 1
        kind, name, url = self._book.kind, worker.name, worker.url
        _LOG.info("discovery %s engine=%s url=%s source=%s", what, name, url, kind)

    def _allowed(self, worker: Worker) -> bool:
        return self._hosts is None or self._hosts.allow(worker.url)

    def _refuse(self, workers: frozenset[Worker]) -> None:
        for worker in sorted(workers - self._refused):
            _LOG.warning(
                "discovery left out, its host is not among --worker-allowed-hosts "
                "engine=%s url=%s source=%s",
                *(worker.name, worker.url, self._book.kind),
            )
        self._refused = workers

    def _engine(self, worker: Worker) -> Engine | None:
        engine = self._fleet.engines.get(worker.name)
        return engine if engine is not None and engine.worker == worker else None

    def _elsewhere(self, url: str) -> bool:
        """Whether another engine is there; one that is leaving is no longer there."""
        return any(e.worker.url == url and not e.leaving for e in self._fleet.engines.values())
