"""How often the fleet is asked for prompt chunks, and what is kept of calls that wait for it.

:mod:`hexgen_vllm.policy.marginal_cost` asks for both, once per engine and look: what it charges for
a prefix depends on who else asks for it, and a call that is held is looked at again and again.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final

from hexgen_vllm.policy.dispatch import Loads
from hexgen_vllm.policy.engine_load import EngineLoad
from hexgen_vllm.types import Call, StepCost

WINDOW: Final = 1000.0
"""Calls over which it decays how often a chunk was asked for."""
_MAX_CHUNKS: Final = 50_000
_MAX_NOTED: Final = 256  # calls, more than are looked at in turn


class _Chunk:
    """A prompt chunk: how often it was asked for, as of which call.

    Attributes:
        counted: it was asked for, and is remembered.
        noted: notes of calls that hold it.
    """

    __slots__ = ("at", "count", "counted", "key", "noted")

    def __init__(self, key: int) -> None:
        self.key, self.count, self.at = key, 0.0, 0
        self.counted, self.noted = False, 0


class CallAtEngine:
    """A held call at an engine, as of the last look: what stays while rates and prefixes do.

    Attributes:
        engine: which.
        cost, prefixes: its step cost and prefix cache then.
        cached, uncached: tokens of the prompt that it had, and the others.
        prefill_s: seconds of these.
        shared: what :meth:`AskedPrefixes.shared` said of them.
    """

    __slots__ = (
        "as_of", "cached", "changes", "chunk", "cost", "engine", "forgotten", "prefill_s",
        "prefixes", "shared", "uncached",
    )  # fmt: skip

    def __init__(self, engine: EngineLoad) -> None:
        self.engine, self.prefixes = engine, engine.prefixes
        self.cost: StepCost | None = None
        self.cached = self.uncached = self.changes = self.forgotten = 0
        self.prefill_s = self.shared = 0.0
        self.chunk: _Chunk | None = None  # the first that is not cached
        self.as_of = -1

    def changed(self) -> bool:
        """Return whether the engine's prefix cache may hold something else than then."""
        return self.changes < 0 or self.changes != self.prefixes.changes

    def renew(self, call: Call, cost: StepCost, cached: int) -> None:
        """Take the present for that."""
        self.prefixes = prefixes = self.engine.prefixes
        self.cost, self.changes, self.cached = cost, prefixes.changes, cached
        self.uncached = max(call.prompt_tokens - cached, 1)
        self.prefill_s = cost.prefill_s(self.uncached, cached)
        self.as_of = -1


class _Noted:
    """What is known of a call's prompt, found once for all the times that it is looked at."""

    __slots__ = ("at_engines", "chunks", "engines", "prefix")

    def __init__(self, prefix: tuple[int, ...], chunks: list[_Chunk]) -> None:
        self.prefix, self.chunks = prefix, chunks
        self.engines: Loads = ()
        self.at_engines = list[CallAtEngine]()


class AskedPrefixes:
    """How often the fleet was lately asked for each prompt chunk, decayed over ``WINDOW`` calls."""

    def __init__(self) -> None:
        self._seen: OrderedDict[int, _Chunk] = OrderedDict()  # counted ones, latest last
        self._noted: dict[str, _Noted] = {}  # by call, oldest first
        self._new: dict[int, _Chunk] = {}  # of them, those that are not counted
        self._calls = self._forgotten = 0

    def add(self, call: Call) -> None:
        """Note that a call with these chunks was placed."""
        self._calls = number = self._calls + 1
        seen = self._seen
        for chunk in self._note(call).chunks:
            key = chunk.key
            if chunk.counted:
                chunk.count = chunk.count * math.exp((chunk.at - number) / WINDOW) + 1.0
                seen.move_to_end(key)
            else:
                chunk.count, chunk.counted = 1.0, True
                seen[key] = chunk
                self._new.pop(key, None)
            chunk.at = number
        self._forget(call.call_id)
        while len(seen) > _MAX_CHUNKS:
            key, chunk = seen.popitem(last=False)
            chunk.count, chunk.counted = 0.0, False
            self._forgotten += 1
            if chunk.noted:
                self._new[key] = chunk

    def shared(self, call: Call, uncached: int, engines: int) -> float:
        """Return the uncached prompt tokens of a call, those of asked-for chunks at their share.

        Args:
            call: whose prompt.
            uncached: tokens that the engine would have to compute.
            engines: among which the chunk's users are spread.
        """
        size, held = call.prefix_chunk_tokens, len(call.prefix)
        if not size or not held:
            return float(uncached)
        chunks = self._note(call).chunks
        tokens = float(call.prompt_tokens - held * size)
        for i in range(max((call.prompt_tokens - uncached) // size, 0), held):
            tokens += size / (1.0 + chunks[i].count / engines)
        return min(tokens, float(uncached))

    def shared_at(self, place: CallAtEngine, call: Call, engines: int) -> float:
        """Return :meth:`shared` for what is uncached at a place, found anew only if it changed.

        Who asks for a chunk asks for all before it, so none changes without the first of them.
        """
        if place.as_of < 0:
            size, chunks = call.prefix_chunk_tokens, self._note(call).chunks
            first = max((call.prompt_tokens - place.uncached) // size, 0) if size else len(chunks)
            place.chunk = chunks[first] if first < len(chunks) else None
        at = 0 if place.chunk is None else place.chunk.at
        if place.as_of != at or place.forgotten != self._forgotten:
            place.shared = self.shared(call, place.uncached, engines)
            place.as_of, place.forgotten = at, self._forgotten
        return place.shared

    def at_engines(self, call: Call, engines: Loads) -> list[CallAtEngine]:
        """Return what is kept of a call at each of ``engines``."""
        noted = self._note(call)
        if noted.engines is not engines and noted.engines != engines:
            noted.at_engines = [CallAtEngine(engine) for engine in engines]
        noted.engines = engines
        return noted.at_engines

    def forget_calls(self) -> None:
        """Keep nothing of calls at engines."""
        for noted in self._noted.values():
            noted.engines, noted.at_engines = (), []

    def _note(self, call: Call) -> _Noted:
        """Return what is known of a call's prompt; what chunks count is that of now, always."""
        noted = self._noted.get(call.call_id)
        if noted is not None and noted.prefix is call.prefix:
            return noted
        self._forget(call.call_id)
        chunks = list[_Chunk]()
        for key in call.prefix:
            chunk = self._seen.get(key) or self._new.get(key)
            if chunk is None:
                chunk = self._new[key] = _Chunk(key)
            chunk.noted += 1
            chunks.append(chunk)
        self._noted[call.call_id] = noted = _Noted(call.prefix, chunks)
        if len(self._noted) > _MAX_NOTED:
            self._forget(next(iter(self._noted)))
        return noted

    def _forget(self, call_id: str) -> None:
        noted = self._noted.pop(call_id, None)
        if noted is not None:
            for chunk in noted.chunks:
                chunk.noted -= 1
                if not chunk.noted and not chunk.counted:
                    self._new.pop(chunk.key, None)
