"""Calls and tokens by tenant and model: what was asked for, and what was answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from hexgen_vllm.router.families import counter
from hexgen_vllm.router.labels import OTHER, Names
from hexgen_vllm.types import Call, CallResult

MAX_TENANTS: Final = 64
MAX_MODELS: Final = 64
_KINDS: Final = ("prompt", "cached", "output")


@dataclass(slots=True)
class _Used:
    """What one tenant had of one model."""

    answered: int = 0
    failed: int = 0
    prompt: int = 0
    cached: int = 0
    output: int = 0


class Usages(Collector):
    """Counts ended calls."""

    def __init__(self) -> None:
        self._tenant = Names(MAX_TENANTS, self._forget_tenant)
        self._model = Names(MAX_MODELS, self._forget_model)
        self._used: dict[tuple[str, str], _Used] = {}

    def begun(self, call: Call) -> None:
        """Note who is counted before the call ends: counters begin at 0 for Prometheus."""
        if (call.tenant, call.model) not in self._used:
            self._of(call)

    def add(self, call: Call, result: CallResult) -> None:
        """Count a call that ended; one that was not answered has no tokens."""
        used = self._of(call, known=result.ok)
        if not result.ok:
            used.failed += 1
            return
        used.answered += 1
        used.prompt += result.prompt_tokens or 0
        used.cached += result.cached_tokens or 0
        used.output += result.output_tokens or 0

    def _of(self, call: Call, *, known: bool = True) -> _Used:
        """Return the counts that a call belongs to; a model is only believed if it is ``known``."""
        key = self._tenant(call.tenant), self._model(call.model) if known else OTHER
        used = self._used.get(key)
        if used is None:
            used = self._used[key] = _Used()
        return used

    def _forget_tenant(self, name: str) -> None:
        self._merge([(key, (OTHER, key[1])) for key in self._used if key[0] == name])

    def _forget_model(self, name: str) -> None:
        self._merge([(key, (key[0], OTHER)) for key in self._used if key[1] == name])

    def _merge(self, moves: list[tuple[tuple[str, str], tuple[str, str]]]) -> None:
        """Count what has one key under another one."""
        for old, new in moves:
            gone = self._used.pop(old)
            used = self._used.setdefault(new, _Used())
            used.answered += gone.answered
            used.failed += gone.failed
            used.prompt += gone.prompt
            used.cached += gone.cached
            used.output += gone.output

    def collect(self) -> Iterator[Metric]:
        """Yield the counters."""
        yield counter("tenant_calls", "Calls that ended, by tenant", ("tenant", "outcome"),
                      self._sums(0, ("answered", "failed")).items())  # fmt: skip
        yield counter("tenant_tokens", "Tokens of answered calls, by tenant; cached ones are "
                      "prompt tokens too", ("tenant", "kind"),
                      self._sums(0, _KINDS).items())  # fmt: skip
        yield counter("model_tokens", "Tokens of answered calls, by model; cached ones are "
                      "prompt tokens too", ("model", "kind"),
                      self._sums(1, _KINDS).items())  # fmt: skip

    def _sums(self, by: int, fields: tuple[str, ...]) -> Counter[tuple[str, str]]:
        """Return fields summed by tenant (0) or model (1)."""
        found: Counter[tuple[str, str]] = Counter()
        for key, used in self._used.items():
            for name in fields:
                found[key[by], name] += getattr(used, name)
        return found
