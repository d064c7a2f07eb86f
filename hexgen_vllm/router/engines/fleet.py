"""The engines a router knows: where they are, what they serve, whether they get calls.

An engine gets calls when its health checks pass, nobody drains it, and its circuit breaker is
closed; while the breaker is on trial it gets one at a time. An engine that was down comes back on
trial. Its data-parallel ranks share all that; calls are placed on each of them
(:mod:`~hexgen_vllm.router.engines.ranks`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any, Final

from yarl import URL

from hexgen_vllm.errors import BadRequest
from hexgen_vllm.router.engines.attempt import Guard
from hexgen_vllm.router.engines.breaker import Breaker, BreakerState
from hexgen_vllm.router.engines.probe import Found, Front, names
from hexgen_vllm.router.engines.ranks import worker_of
from hexgen_vllm.router.errors import (
    ENDINGS,
    EngineFailed,
    Outcome,
)
from hexgen_vllm.router.options import RouterOptions, Worker
from hexgen_vllm.router.service import Service
from hexgen_vllm.types import EngineKind, EngineSpec, EngineState, Role

_MOST_ADDRESSES: Final = 64  # that are remembered
_BETTER: Final = 0.5
_TAKES_CALLS: Final = (EngineState.READY, EngineState.TRIAL)
_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class Engine:
    """One engine (mutable, owned by the :class:`Fleet`).

    Attributes:
        worker: its name and URL.
        breaker: counts how its calls ended.
        specs: what it is, one for each target; empty until it was up once.
        cards: its entries of ``/v1/models``.
        front: what kind of server it has.
        up: whether its health checks pass.
        stalled: targets that had work and did nothing, and have not answered a call since.
        draining: whether an operator takes it out of service.
        leaving: whether it is to be forgotten when its calls have ended.
        steps: steps that each target has run, where it says so.
        warm: targets that have run a step or sent part of an answer since the engine joined.
        worked_s: time of the last sign of work.
        silent: seconds that targets with calls have shown no sign of work.
        failing_since_s: when the first of the health checks that failed in a row was sent.
        state: what follows from all that.
        why: why it gets no calls, ``""`` while it does.
    """

    worker: Worker
    breaker: Breaker
    specs: tuple[EngineSpec, ...] = ()
    cards: tuple[dict[str, Any], ...] = ()
    front: Front = Front()  # noqa: RUF009 - a tuple
    up: bool = False
    draining: bool = False
    leaving: bool = False
    stalled: set[str] = field(default_factory=set)
    steps: dict[str, int] = field(default_factory=dict)
    warm: set[str] = field(default_factory=set)
    worked_s: float = -math.inf
    silent: dict[str, float] = field(default_factory=dict)
    failing_since_s: float | None = None
    state: EngineState = EngineState.DOWN
    why: str = "not up yet"
    _addresses: dict[str, URL] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What clients may know it by."""
        return self.worker.name

    @property
    def answers(self) -> bool:
        """Whether it does more than compute prompts for others."""
        return self.worker.role is not Role.PREFILL

    @property
    def spec(self) -> EngineSpec | None:
        """What is so for all its targets but for the name, ``None`` until it was up once."""
        return self.specs[0] if self.specs else None

    @property
    def targets(self) -> dict[str, EngineSpec | None]:
        """What calls are placed on: the engine itself, or each of its ranks."""
        return {spec.engine_id: spec for spec in self.specs} or {self.name: None}

    def serves_all_of(self, models: frozenset[str]) -> bool:
        """Whether it serves all of ``models``; without a list it serves any."""
        own = frozenset() if self.spec is None else self.spec.models
        return not own or (bool(models) and models <= own)

    @property
    def kind(self) -> EngineKind:
        """What it can order by."""
        return EngineKind.FCFS if self.spec is None else self.spec.kind

    def worked(self, target: str, now: float) -> None:
        """Note a sign of work of a target."""
        self.warm.add(target)
        self.worked_s = now

    def cold(self) -> None:
        """Forget what it did before it started anew."""
        self.warm.clear()
        self.silent.clear()

    @property
    def takes_calls(self) -> bool:
        """Whether it gets calls, if only one at a time."""
        return self.state in _TAKES_CALLS

    @property
    def host_port(self) -> str:
        """Where it is, as it could be written in a text."""
        return self.worker.url.partition("//")[2].partition("/")[0]

    def address(self, path: str) -> URL:
        """Return the URL of ``path`` (with query) on the engine.

        Raises:
            BadRequest: there can be no such URL.
        """
        known = self._addresses.get(path)
        if known is None:
            try:
                known = URL(self.worker.url + path, encoded=True)
            except ValueError:
                raise BadRequest("The target of the request is no path.") from None
            if "?" not in path and len(self._addresses) < _MOST_ADDRESSES:
                self._addresses[path] = known
        return known

    def standing(self) -> EngineState:
        """Return the state that follows from the other attributes."""
        if not self.up or self.breaker.state is BreakerState.OPEN:
            return EngineState.DOWN
        if self.draining:
            return EngineState.DRAINING
        return EngineState.TRIAL if self.breaker.state is BreakerState.TRIAL else EngineState.READY


class Fleet:
    """All engines, by name.

    Args:
        options: of the router; names the engines it starts with.
        service: is told of every change.
        guard: ends tries on engines that are lost.
    """

    def __init__(self, options: RouterOptions, service: Service, guard: Guard) -> None:
        self.engines: dict[str, Engine] = {}
        self._options, self._service, self._guard = options, service, guard
        for worker in options.workers():
            self.add(worker)

    # What there is

    def add(self, worker: Worker) -> Engine:
        """Add an engine that nobody knows anything about yet."""
        engine = self.engines[worker.name] = Engine(worker, Breaker(self._options))
        return engine

    def remove(self, name: str) -> None:
        """Forget an engine; calls on it that have seen no answer go elsewhere."""
        for spec in self.engines.pop(name).specs:
            self._service.engine_left(spec.engine_id)
        self._guard.engine_lost(name)
        _LOG.info("engine removed engine=%s", name)

    def engine(self, target: str) -> Engine:
        """Return the engine that has ``target``, which a call was placed on.

        Raises:
            EngineFailed: it has left since.
        """
        engine = self.engines.get(target) or self.engines.get(worker_of(target))
        if engine is not None and target in [spec.engine_id for spec in engine.specs]:
            return engine
        raise EngineFailed(Outcome.LOST, retryable=True)

    def ready(self) -> list[Engine]:
        """Return the engines that get calls, sorted by name."""
        return sorted((e for e in self.engines.values() if e.takes_calls), key=lambda e: e.name)

    def least_busy(self, model: str, without: Collection[str] = ()) -> Engine | None:
        """Return the engine with the fewest calls of those that get calls and serve ``model``.

        Engines that are there for prompts only come last.

        Args:
            model: name of a model.
            without: names of engines that are not asked.
        """
        loads = self._service.coordinator.engines
        known = [
            engine
            for engine in self.ready()
            if engine.name not in without
            and engine.spec is not None
            and (not engine.spec.models or model in engine.spec.models)
        ]
        return min(
            known,
            key=lambda e: (
                not e.answers,
                sum(len(loads[t].in_flight) for t in e.targets if t in loads),
            ),
            default=None,
        )

    def cards(self) -> list[dict[str, Any]]:
        """Return the model cards of all engines that were up once; the first one of a name."""
        found: dict[str, dict[str, Any]] = {}
        for engine in self.engines.values():
            for card in engine.cards:
                found.setdefault(card["id"], card)
        return list(found.values())

    def knows(self, model: str) -> bool:
        """Whether an engine, up or not, serves ``model``; an engine without a list serves any."""
        for models in [e.specs[0].models for e in self.engines.values() if e.specs]:
            if not models or model in models:
                return True
        return False

    def default_model(self) -> str | None:
        """Return the model that every engine takes a call to mean which names none.

        vLLM takes the first one of its list, whatever aliases and adapters follow. ``""`` when no
        engine has a list; ``None`` when they would not take the same.
        """
        known = [engine for engine in self.engines.values() if engine.spec is not None]
        firsts = {str(e.cards[0]["id"]) if e.cards else "" for e in known}
        return firsts.pop() if len(firsts) == 1 else None

    # What health checks find

    def joined(self, name: str, found: Found) -> None:
        """Take in an engine that is up, for the first time or again."""
        engine = self.engines[name]
        first = engine.spec is None
        if not first and not self._options.disable_circuit_breaker:
            engine.breaker.half_open()
        engine.up = True
        engine.failing_since_s = None
        engine.cold()
        self.described(name, found)
        _log_joined(name, found, first=first)

    def described(self, name: str, found: Found) -> None:
        """Take in what an engine that is up says of itself."""
        engine, before = self.engines[name], self.engines[name].targets
        changed, engine.specs, engine.cards = engine.specs != found.specs, found.specs, found.cards
        engine.front = found.front
        if not changed:
            self._settle(engine)
            return
        engine.state, engine.why = engine.standing(), ""
        engine.steps.clear()
        for spec in found.specs:
            self._service.engine_joined(spec, engine.state)
        for target in before.keys() - engine.targets.keys():
            self._service.engine_left(target)

    def listed(self, name: str, cards: tuple[dict[str, Any], ...]) -> None:
        """Note what models an engine has now: adapters come and go while it runs."""
        engine, models = self.engines[name], names(cards)
        engine.cards = cards
        if engine.spec is not None and engine.spec.models != models:
            _LOG.info("engine models engine=%s models=%s", name, ",".join(sorted(models)))
            engine.specs = tuple(replace(spec, models=models) for spec in engine.specs)
            for spec in engine.specs:
                self._service.engine_serves(spec.engine_id, models)

    def restarted(self, name: str) -> None:
        """Note that an engine started anew behind our back."""
        engine = self.engines[name]
        engine.cold()
        _LOG.warning("engine restarted engine=%s", name)
        for spec in engine.specs:
            self._service.engine_joined(spec, engine.state)

    def lost(self, name: str, why: str) -> None:
        """Give an engine no more calls; those that have seen no answer go elsewhere."""
        engine = self.engines.get(name)
        if engine is None or not engine.up:
            return
        engine.up = False
        self._settle(engine, why)
        self._guard.engine_lost(name)

    # What calls find

    def tried(self, engine: Engine, target: str, outcome: Outcome) -> None:
        """Note how a call on an engine ended."""
        well = ENDINGS[outcome].engine_is_well
        if well:
            engine.stalled.discard(target)
            engine.breaker.succeeded()
            if engine.state is not EngineState.READY:
                self._settle(engine)
        elif well is False:
            now = self._service.clock.now()
            if engine.breaker.failed(now) and self._others(engine, best=_BETTER):
                engine.breaker.open(now)
                self._settle(engine, "too many of its calls failed")

    def stalled(self, engine: Engine, target: str, why: str) -> None:
        """Give an engine no more calls; those without an answer go elsewhere if they can."""
        engine.stalled.add(target)
        engine.breaker.open(self._service.clock.now())
        self._settle(engine, why)
        if self._others(engine):
            self._guard.engine_lost(engine.name)

    def revived(self, engine: Engine, target: str) -> None:
        """Note a sign of life of a target; it counts if that was stalled."""
        if target in engine.stalled and engine.breaker.state is BreakerState.OPEN:
            engine.breaker.half_open()
            self._settle(engine)

    def others(self, engine: Engine) -> bool:
        """Whether another engine could take the calls of ``engine``: one that is not silent too."""
        limit_s = self._options.engine_stall_secs
        return any(
            other is not engine
            and other.takes_calls
            and (other.answers or not engine.answers)
            and other.failing_since_s is None
            and (engine.spec is None or other.serves_all_of(engine.spec.models))
            and not any(silent_s > limit_s for silent_s in other.silent.values())
            for other in self.engines.values()
        )

    def tick(self, now: float) -> None:
        """Do what time alone causes; call it about once a second or more often."""
        for engine in self.engines.values():
            engine.breaker.tick(now)
            self._settle(engine)

    # What operators want

    def drain(self, name: str, draining: bool = True, why: str = "drained by an operator") -> None:
        """Give an engine no new calls, or, with ``draining`` false, calls again."""
        engine = self.engines[name]
        engine.draining = draining
        engine.leaving = engine.leaving and draining
        self._settle(engine, why)

    def _others(self, engine: Engine, best: float | None = None) -> bool:
        """Whether calls would find another engine: the last one is not taken out for errors.

        Args:
            engine: what they would not find.
            best: most of the other's calls that fail, in shares of those of ``engine`` that do;
                ``None`` is any.
                Where they fail everywhere it is the calls: one client with such calls must not
                take one engine after the other from all.
        """
        most = 1.0 if best is None or not engine.answers else best * engine.breaker.bad_share
        return any(
            e is not engine
            and e.takes_calls
            and (e.answers or not engine.answers)
            and e.breaker.bad_share <= most
            for e in self.engines.values()
        )

    def _settle(self, engine: Engine, why: str = "") -> None:
        """Act upon the present standing of an engine; ``why`` it gets no calls."""
        state = engine.standing()
        if state is engine.state:
            return
        engine.state = state
        engine.why = "" if engine.takes_calls else why
        level = logging.WARNING if state is EngineState.DOWN else logging.INFO
        _LOG.log(level, "engine %s engine=%s reason=%r", state.value, engine.name, engine.why)
        for spec in engine.specs:
            self._service.engine_changed(spec.engine_id, state)


def _log_joined(name: str, found: Found, *, first: bool) -> None:
    spec = found.spec
    note = () if found.certain else ("it does not say how it orders calls; see --stock-scheduling",)
    _LOG.info(
        "engine %s engine=%s kind=%s models=%s max_num_seqs=%s kv_tokens=%s ranks=%d"
        + " note=%r" * len(note),
        "joined" if first else "back",
        name,
        spec.kind.value,
        ",".join(sorted(spec.models)) or "any",
        spec.max_num_seqs,
        spec.kv_tokens,
        len(found.specs),
        *note,
    )
