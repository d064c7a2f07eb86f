"""Keys of the calls in a simulated engine, and the rates they are priced at.

The same formulas as in the live engine (:mod:`hexgen_vllm.policy.slack`,
:mod:`hexgen_vllm.policy.service`), and the same fit of the step cost to the engine's own steps,
unless the true cost is taken for known.
"""

from __future__ import annotations

from typing import Final

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.policy.cost_model import CostFit, is_sampled
from hexgen_vllm.policy.order import put
from hexgen_vllm.policy.service import ServiceRates, output_left
from hexgen_vllm.policy.slack import hexgen_key, latest_start
from hexgen_vllm.sim.sequence import Sequence
from hexgen_vllm.types import StepCost

_WEIGHT: Final = 0.05  # of the newest step in the usual step, as in the live telemetry
_RATES_MOVED: Final = 0.1
_REFIT_EVERY_STEPS: Final = 32


class Pricing:
    """Prices calls by one order.

    Attributes:
        rates: the rates in force.
        prefill_share: share of busy time spent on prefill, 0 to 1.
        fit: what the engine learned of its step cost; ``None`` where that is known.

    Args:
        options: order and limits.
        cost: the engine's step cost.
        chunk: prompt tokens that one step computes at most.
        fit: learns the step cost; without one it is known.
    """

    def __init__(
        self, options: EngineOptions, cost: StepCost, chunk: int, fit: CostFit | None = None
    ) -> None:
        self._order, self._cost, self._chunk = options.order, cost, chunk
        self.fit = fit
        self._step_s = self._alone_s = cost.step_s(1)
        self._uncached = 1.0
        self._steps = 0
        self._checked = 0
        self._busy_s = self._prefill_s = 0.0
        self.rates = ServiceRates.seeds(options)

    @property
    def prefill_share(self) -> float | None:
        """Share of recent busy time that prefill took; ``None`` before the first step."""
        return self._prefill_s / self._busy_s if self._busy_s > 0 else None

    def price(self, sequence: Sequence, tokens: int, computed: int) -> None:
        """Set latest start and key of a call from what it still has to do.

        Args:
            sequence: the call.
            tokens: its prompt and output tokens so far.
            computed: how many of them have their KV.
        """
        done = tokens - sequence.prompt_tokens
        left = output_left(sequence.expected_tokens, done, sequence.most_tokens)
        service_s = self.rates.service_s(tokens - computed, left)
        own_key_s = sequence.priority_key
        if self._order == "hexgen":
            whole_s = self.rates.service_s(sequence.prompt_tokens, sequence.expected_tokens)
            own_key_s = hexgen_key(
                sequence.arrived_s, sequence.deadline_s, sequence.tail_s, whole_s
            )
        put(sequence, self._order, sequence.priority, sequence.arrived_s, service_s, own_key_s)

    def late_from_s(self, sequence: Sequence) -> float:
        """Return the moment from which a waiting call cannot be on time any more."""
        done = sequence.tokens - sequence.prompt_tokens
        left = output_left(sequence.likely_least, done, sequence.most_tokens)
        least_s = self.rates.prefill_s(sequence.tokens) + left * self._alone_s
        return latest_start(sequence.deadline_s, sequence.least_tail_s, least_s)

    def admitted(self, prompt_tokens: int, cached_tokens: int) -> None:
        """Learn from the prefix hit of a call."""
        self._uncached += _WEIGHT * (1.0 - cached_tokens / prompt_tokens - self._uncached)

    def measured(
        self, steps: int, seconds: float, n: int, context: int, prefill: int, area: float
    ) -> None:
        """Fit the step cost to equal steps, as the live engine does to one after the other.

        Args:
            steps: how many.
            seconds: what they took together.
            n: sequences that decoded.
            context: sum of their context tokens in the first step; each grows by one a step.
            prefill: prompt tokens computed.
            area: sum over prefill chunks of tokens times mean context.
        """
        fit = self.fit
        if fit is not None and is_sampled(self._steps, steps, prefill > 0, seconds / steps):
            mean = context + n * (steps - 1) / 2
            fit.observe_step(n, mean, prefill, area, seconds / steps)

    def stepped(self, steps: int, seconds: float, prefill_s: float) -> bool:
        """Learn from equal steps; return whether new rates are in force.

        Args:
            steps: how many.
            seconds: what they took together.
            prefill_s: of it, for prefill.
        """
        keep = (1.0 - _WEIGHT) ** steps
        self._step_s += (1.0 - keep) * (seconds / steps - self._step_s)
        decay = 0.99**steps
        self._busy_s = decay * self._busy_s + seconds
        self._prefill_s = decay * self._prefill_s + prefill_s
        self._steps += steps
        if self._steps - self._checked < _REFIT_EVERY_STEPS:
            return False
        self._checked = self._steps
        cost = self._cost if self.fit is None else self.fit.cost()
        if cost is None:
            return False
        rates = ServiceRates.fitted(cost, self._chunk, self._step_s, self._uncached)
        if not rates.differs(self.rates, _RATES_MOVED):
            return False
        self.rates = rates
        return True
