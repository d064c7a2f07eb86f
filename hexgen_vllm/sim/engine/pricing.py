"""Keys of the calls in a simulated engine, and the rates they are priced at.

The same formulas as in the live engine (:mod:`hexgen_vllm.policy.order`,
:mod:`hexgen_vllm.policy.cost`), and the same fit of the step cost to the engine's own steps,
unless the true cost is taken for known.
"""

from __future__ import annotations

from typing import Final

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.policy.cost import CostFit, is_sampled
from hexgen_vllm.policy.order import late_from_s, price
from hexgen_vllm.policy.pace import reachable_token_s
from hexgen_vllm.policy.service_rates import ServiceRates
from hexgen_vllm.sim.engine.sequence import Sequence
from hexgen_vllm.types import NO_DEADLINE, StepCost

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
        self._pace = options.pace
        self.fit = fit
        self._step_s = cost.step_s(1)
        self._reachable_s: float | None = None
        self._uncached = 1.0
        self._steps = 0
        self._checked = 0
        self._busy_s = self._prefill_s = 0.0
        self.rates = ServiceRates.seeds(options)

    @property
    def prefill_share(self) -> float | None:
        """Share of recent busy time that prefill took; ``None`` before the first step."""
        return self._prefill_s / self._busy_s if self._busy_s > 0 else None

    @property
    def cost(self) -> StepCost | None:
        """The step cost as the engine knows it, ``None`` while it does not."""
        return self._cost if self.fit is None else self.fit.cost()

    def reach(self, tight: int, context: int) -> None:
        """Note the calls with a deadline in the batch, and the tokens whose KV they hold."""
        cost, usual_s = self.cost, self.rates.output_token_s
        if cost is None:
            self._reachable_s = None
        elif not self._pace:
            self._reachable_s = usual_s
        else:
            share = self.prefill_share or 0.0
            self._reachable_s = reachable_token_s(cost, tight, context, share, usual_s)

    def price(self, sequence: Sequence, tokens: int, computed: int) -> None:
        """Set latest start and key of a call from what it still has to do.

        Args:
            sequence: the call.
            tokens: its prompt and output tokens so far.
            computed: how many of them have their KV.
        """
        price(
            sequence,
            self._order,
            self.rates,
            sequence.priority,
            sequence.arrived_s,
            prompt=sequence.prompt_tokens,
            ahead=tokens - computed,
            done=tokens - sequence.prompt_tokens,
            most=sequence.most_tokens,
            own_key_s=sequence.priority_key,
        )

    def late_from_s(self, sequence: Sequence) -> float:
        """Return the moment from which a waiting call cannot be on time any more, as live."""
        if sequence.routed or self._reachable_s is None:
            return NO_DEADLINE
        tokens, most = sequence.tokens, sequence.most_tokens
        done = tokens - sequence.prompt_tokens
        return late_from_s(sequence, self.rates, self._reachable_s, tokens, done, most)

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
        cost = self.cost
        if cost is None:
            return False
        rates = ServiceRates.fitted(cost, self._chunk, self._step_s, self._uncached)
        if not rates.differs(self.rates, _RATES_MOVED):
            return False
        self.rates = rates
        return True
