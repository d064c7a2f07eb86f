"""The time that a call takes on an engine: what is left of it, priced at the engine's rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.policy.calls import Tail
from hexgen_vllm.types import StepCost

_LEAST_OVERRUN: Final = 32


@dataclass(frozen=True, slots=True)
class ServiceRates:
    """How fast one call is served in the batch it would join.

    Attributes:
        prefill_token_s: seconds per uncached prompt token.
        prefill_context_s: seconds per token and token of context before it.
        output_token_s: seconds per output token.
        uncached: share of prompt tokens that the prefix cache does not serve.
    """

    prefill_token_s: float
    prefill_context_s: float
    output_token_s: float
    uncached: float = 1.0

    @classmethod
    def seeds(cls, options: EngineOptions) -> ServiceRates:
        """Return the rates assumed until the engine has measured its own."""
        return cls(1.0 / options.prefill_tokens_per_s, 0.0, 1.0 / options.decode_tokens_per_s)

    @classmethod
    def fitted(
        cls, cost: StepCost, chunk: int, output_token_s: float, uncached: float
    ) -> ServiceRates:
        """Return the rates that follow from a fitted step cost.

        Args:
            cost: the fit.
            chunk: prompt tokens that one step computes at most.
            output_token_s: the fit's step time in the usual batch, per output token of a call.
            uncached: share of prompt tokens not served by the prefix cache.
        """
        per_token = cost.p1 + (cost.c0 + cost.p0) / max(chunk, 1)
        return cls(per_token, cost.p2, output_token_s, uncached)

    def prefill_s(self, tokens: int) -> float:
        """Return the seconds of prefilling ``tokens`` from the start of a sequence."""
        work = tokens * self.uncached
        return work * (self.prefill_token_s + self.prefill_context_s * tokens / 2)

    def service_s(self, prefill_tokens: int, output_tokens: int) -> float:
        """Return T, the seconds until a call with this much left is done."""
        return self.prefill_s(prefill_tokens) + output_tokens * self.output_token_s

    def tail_prefill_s(self, tail: Tail) -> float:
        """Return the seconds of the prefills of what follows a call."""
        return tail.prefill_tokens * self.prefill_token_s

    def tail_s(self, tail: Tail) -> float:
        """Return R, the seconds of what follows a call."""
        return self.tail_prefill_s(tail) + tail.output_tokens * self.output_token_s

    def differs(self, other: ServiceRates, share: float) -> bool:
        """Return whether a typical prefill or decode takes over ``share`` more or less time."""
        pairs = (
            (self.prefill_s(1024), other.prefill_s(1024)),
            (self.output_token_s, other.output_token_s),
        )
        return any(abs(a - b) > share * max(a, b) for a, b in pairs)


def output_left(expected: int, done: int, limit: int) -> int:
    """Return the output tokens still expected, at least 1 and within ``limit``.

    A call that outruns its estimate is expected to go on for half of what it wrote.
    """
    left = expected - done if done < expected else max(done // 2, _LEAST_OVERRUN)
    return max(min(left, limit - done), 1)
