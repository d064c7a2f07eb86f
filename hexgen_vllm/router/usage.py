"""Calls and tokens by tenant and model: what was asked for, and what was answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from hexgen_vllm.router.families import counter
from hexgen_vllm.router.labels import Names
from hexgen_vllm.types import Call, CallResult

MAX_TENANTS: Final = 64
MAX_MODELS: Final = 64


class Usages(Collector):
    """Counts ended calls."""

    def __init__(self) -> None:
        self._tenant, self._model = Names(MAX_TENANTS), Names(MAX_MODELS)
        self._calls: Counter[tuple[str, str]] = Counter()
        self._tenant_tokens: Counter[tuple[str, str]] = Counter()
        self._model_tokens: Counter[tuple[str, str]] = Counter()

    def add(self, call: Call, result: CallResult) -> None:
        """Count a call that ended; one that was not answered has no tokens."""
        tenant = self._tenant(call.tenant)
        self._calls[tenant, "answered" if result.ok else "failed"] += 1
        if not result.ok:
            return
        model = self._model(call.model)
        for kind, tokens in (
            ("prompt", result.prompt_tokens),
            ("cached", result.cached_tokens),
            ("output", result.output_tokens),
        ):
            if tokens:
                self._tenant_tokens[tenant, kind] += tokens
                self._model_tokens[model, kind] += tokens

    def collect(self) -> Iterator[Metric]:
        """Yield the counters."""
        yield counter("tenant_calls", "Calls that ended, by tenant", ("tenant", "outcome"),
                      self._calls.items())  # fmt: skip
        yield counter("tenant_tokens", "Tokens of answered calls, by tenant; cached ones are "
                      "prompt tokens too", ("tenant", "kind"),
                      self._tenant_tokens.items())  # fmt: skip
        yield counter("model_tokens", "Tokens of answered calls, by model; cached ones are "
                      "prompt tokens too", ("model", "kind"),
                      self._model_tokens.items())  # fmt: skip
