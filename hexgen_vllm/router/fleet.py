"""The engines a router knows: where they are, what they serve, whether they get calls."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from yarl import URL

from hexgen_vllm.router.attempt import Guard
from hexgen_vllm.router.options import Worker
from hexgen_vllm.router.probe import Found
from hexgen_vllm.router.service import Service
from hexgen_vllm.types import EngineKind, EngineSpec, EngineState

_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class Engine:
    """One engine (mutable, owned by the :class:`Fleet`).

    Attributes:
        worker: its name and URL.
        spec: what it is, ``None`` until it was up once.
        cards: its entries of ``/v1/models``.
        state: whether it gets calls.
    """

    worker: Worker
    spec: EngineSpec | None = None
    cards: tuple[dict[str, Any], ...] = ()
    state: EngineState = EngineState.DOWN
    _addresses: dict[str, URL] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What clients may know it by."""
        return self.worker.name

    @property
    def kind(self) -> EngineKind:
        """What it can order by."""
        return EngineKind.FCFS if self.spec is None else self.spec.kind

    def address(self, path: str) -> URL:
        """Return the URL of ``path`` (with query) on the engine."""
        known = self._addresses.get(path)
        if known is None:
            known = URL(self.worker.url + path, encoded=True)
            if "?" not in path:  # bounded: only the paths the router serves
                self._addresses[path] = known
        return known


class Fleet:
    """All engines, by name.

    Args:
        workers: names and URLs.
        service: is told of every change.
        guard: ends tries on engines that are lost.
    """

    def __init__(self, workers: tuple[Worker, ...], service: Service, guard: Guard) -> None:
        self.engines = {worker.name: Engine(worker) for worker in workers}
        self._service, self._guard = service, guard

    def ready(self) -> list[Engine]:
        """Return the engines that get calls, sorted by name."""
        found = [e for e in self.engines.values() if e.state is EngineState.READY]
        return sorted(found, key=lambda engine: engine.name)

    def cards(self) -> list[dict[str, Any]]:
        """Return the model cards of all engines that were up once; the first one of a name."""
        found: dict[str, dict[str, Any]] = {}
        for engine in self.engines.values():
            for card in engine.cards:
                found.setdefault(card["id"], card)
        return list(found.values())

    def knows(self, model: str) -> bool:
        """Whether an engine, up or not, serves ``model``; an engine without a list serves any."""
        specs = [e.spec for e in self.engines.values() if e.spec is not None]
        return any(not spec.models or model in spec.models for spec in specs)

    def only_model(self) -> str | None:
        """Return the one model there is, ``None`` when there are several or none is known."""
        cards = self.cards()
        return str(cards[0]["id"]) if len(cards) == 1 else None

    def joined(self, name: str, found: Found) -> None:
        """Take in an engine that is up, for the first time or again."""
        engine = self.engines[name]
        first, changed = engine.spec is None, engine.spec != found.spec
        engine.spec, engine.cards, engine.state = found.spec, found.cards, EngineState.READY
        if changed:
            self._service.engine_joined(found.spec)
        else:
            self._service.engine_changed(name, EngineState.READY)
        _LOG.info("engine %s engine=%s %s", "joined" if first else "back", name, _about(found))

    def restarted(self, name: str) -> None:
        """Note that an engine started anew behind our back."""
        spec = self.engines[name].spec
        if spec is not None:
            _LOG.warning("engine restarted engine=%s", name)
            self._service.engine_joined(spec)

    def lost(self, name: str, why: str) -> None:
        """Give an engine no more calls; those that have seen no answer go elsewhere."""
        engine = self.engines[name]
        if engine.state is EngineState.DOWN:
            return
        engine.state = EngineState.DOWN
        _LOG.warning("engine down engine=%s reason=%r", name, why)
        self._service.engine_changed(name, EngineState.DOWN)
        self._guard.engine_lost(name)


def _about(found: Found) -> str:
    spec = found.spec
    models = ",".join(sorted(spec.models)) or "any"
    text = f"kind={spec.kind.value} models={models}"
    text += f" max_num_seqs={spec.max_num_seqs} kv_tokens={spec.kv_tokens}"
    if not found.certain:
        text += " note='it does not say how it orders calls; see --stock-scheduling'"
    return text
