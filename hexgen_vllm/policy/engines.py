"""The engines that calls can be placed on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

from hexgen_vllm.policy.engine_load import Elsewhere, EngineLoad
from hexgen_vllm.types import (
    Call,
    EngineSpec,
    EngineState,
)

_TRIAL: Final = EngineState.TRIAL
_MAX_MODELS: Final = 256


class Engines:
    """Engines that have joined and not left.

    Attributes:
        loads: by name.
    """

    def __init__(self) -> None:
        self.loads: dict[str, EngineLoad] = {}
        self._elsewhere: dict[str, Mapping[str, Elsewhere]] = {}  # by who told, by engine
        self._by_name: list[EngineLoad] = []  # that answer
        self._prefillers: list[EngineLoad] = []
        self._lengths_differ = self._models_differ = False
        self._by_model: dict[str, list[EngineLoad]] = {}  # that take calls; as long as that holds

    def joined(self, spec: EngineSpec, state: EngineState) -> None:
        """Add an engine, or note that one restarted."""
        known = self.loads.get(spec.engine_id)
        if known is not None:
            known.restarted(spec, state)
        else:
            self.loads[spec.engine_id] = engine = EngineLoad(spec)
            engine.state = state
            self._add_up(engine)
        self._sort()

    def left(self, engine_id: str) -> None:
        """Forget an engine; calls on it keep their own accounting until they end."""
        self.loads.pop(engine_id, None)
        self._sort()

    def changed(self, engine_id: str, state: EngineState) -> None:
        """Note an engine's new state; one that was down has probably lost its prefix cache."""
        engine = self.loads[engine_id]
        if engine.state is EngineState.DOWN and state is not EngineState.DOWN:
            engine.prefixes.clear()
        engine.state = state
        self._by_model.clear()

    def told(self, source: str, loads: Mapping[str, Elsewhere]) -> None:
        """Note what others have placed, in place of all that ``source`` told before."""
        self._elsewhere[source] = loads
        for engine in self.loads.values():
            self._add_up(engine)

    def _add_up(self, engine: EngineLoad) -> None:
        parts = [of[engine.engine_id] for of in self._elsewhere.values() if engine.engine_id in of]
        found = Elsewhere.total(parts)
        if found != engine.elsewhere:
            engine.elsewhere = found

    def serves(self, engine_id: str, models: frozenset[str]) -> None:
        """Note that an engine has other models than before, such as adapters loaded since."""
        engine = self.loads[engine_id]
        engine.spec = replace(engine.spec, models=models)
        self._sort()

    def candidates(self, call: Call, refused_by: frozenset[str]) -> list[EngineLoad]:
        """Return the engines that may get ``call`` now, sorted by name; not to be changed.

        Where engines differ in the longest call they take, those that are long enough for this
        one. If none is, all: prompt lengths are estimates, and engines refuse what is too long.
        """
        found = self._by_model.get(call.model)
        if found is None or call.engine is not None:
            found = [e for e in self._by_name if e.open and e.knows(call)]
            # One on trial is open or not by what it has; of model names clients can have many.
            on_trial = any(e.state is _TRIAL for e in self._by_name)
            if call.engine is None and not on_trial and len(self._by_model) < _MAX_MODELS:
                self._by_model[call.model] = found
        if refused_by:
            found = [e for e in found if e.engine_id not in refused_by]
        if not self._lengths_differ:
            return found
        return [e for e in found if _fits(e.spec, call)] or found

    def prefillers(self, call: Call, refused_by: frozenset[str]) -> list[EngineLoad]:
        """Return the engines that may compute the prompt of ``call`` for others."""
        if not self._prefillers or call.whole or call.engine is not None:
            return []
        return [
            e
            for e in self._prefillers
            if e.open
            and e.computes(call.model)
            and e.engine_id not in refused_by
            and _fits(e.spec, call)
        ]

    def reachable(self, call: Call, refused_by: frozenset[str]) -> list[EngineLoad]:
        """Return the engines that get ``call`` now, or once the call they are tried with ends."""
        return [
            e
            for e in self._by_name
            if e.at_work and e.knows(call) and e.engine_id not in refused_by
        ]

    def any_room(self, depth: int) -> bool:
        """Return whether it is worth looking at held calls.

        An engine that takes no calls counts: those that only it could serve must hear of it.
        """
        for engine in self._by_name:
            if engine.room(depth) or not engine.at_work:
                return True
        return not self._by_name

    def with_room(self, models: Iterable[str], depth: int) -> set[str] | None:
        """Return those of ``models`` that are worth looking for calls of, ``None`` for all.

        A model that no engine at work has counts: its calls must hear of it.
        """
        if not self._models_differ:
            return None
        at_work = [e for e in self._by_name if e.at_work]
        roomy = [e for e in at_work if e.room(depth)]
        return {
            model
            for model in models
            if any(e.has(model) for e in roomy) or not any(e.has(model) for e in at_work)
        }

    def presume(self, now: float) -> None:
        """Take calls for started whose first token is due and will not be seen."""
        for engine in self.loads.values():
            engine.presume(now)

    def _sort(self) -> None:
        engines = [self.loads[name] for name in sorted(self.loads)]
        self._by_name = [e for e in engines if e.answers]
        self._prefillers = [e for e in engines if not e.answers]
        self._lengths_differ = len({e.spec.max_model_len for e in self._by_name}) > 1
        self._models_differ = len({e.spec.models for e in self._by_name}) > 1
        self._by_model.clear()


def _fits(spec: EngineSpec, call: Call) -> bool:
    most = spec.max_model_len
    return most is None or call.prompt_tokens + (call.max_output_tokens or 1) <= most
