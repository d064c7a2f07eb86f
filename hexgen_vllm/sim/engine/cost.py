"""Keys of the calls in a simulated engine, the rates they are priced at, and what steps cost.

The same formulas as in the live engine (:mod:`hexgen_vllm.policy.urgency`,
:mod:`hexgen_vllm.policy.cost`), and the same fit of the step cost to the engine's own steps,
unless the true cost is taken for known.

The decoding part of a batch is kept in a handful of numbers. Every decoding sequence gains one
token a step, so none of them is touched in a step: a clock counts steps, a sequence remembers the
clock's reading when it joined, and what a step needs (how many decode, over how much context, who
needs a new block, who ends next) is kept in sums.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Final

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.policy.cost import CostFit, ServiceRates, is_sampled
from hexgen_vllm.policy.order import late_from_s, price
from hexgen_vllm.policy.pace import reachable_token_s
from hexgen_vllm.sim.engine.sequence import Sequence
from hexgen_vllm.types import NO_DEADLINE, StepCost

MARK_TOKENS: Final = 64
"""Tokens between two marks; the router takes note of a call's progress as often."""
_WEIGHT: Final = 0.05  # of the newest step in the usual step, as in the live telemetry
_RATES_MOVED: Final = 0.1
_REFIT_EVERY_STEPS: Final = 32


class DecodeClock:
    """Sequences that decode.

    Attributes:
        steps: steps so far; the clock.
        size: sequences.
        context: sum of their tokens with KV.

    Args:
        block_size: tokens of a KV block.
    """

    __slots__ = ("_block_size", "_ends", "_marks", "_residues", "context", "size", "steps")

    def __init__(self, block_size: int) -> None:
        self.steps = self.size = self.context = 0
        self._block_size = block_size
        # By remainder of the clock at which a sequence needs a new block: how many do.
        self._residues = [0] * block_size
        self._ends: list[tuple[int, int, Sequence]] = []
        self._marks: list[tuple[int, int, Sequence]] = []

    def join(self, sequence: Sequence) -> None:
        """Let ``sequence``, whose last token is not computed yet, decode from the next step on."""
        sequence.base = sequence.tokens - self.steps
        sequence.decoding = True
        self.size += 1
        self.context += sequence.tokens - 1
        self._residues[(1 - sequence.base) % self._block_size] += 1
        left = sequence.total_tokens - sequence.tokens
        heappush(self._ends, (self.steps + left, sequence.number, sequence))
        if left > MARK_TOKENS:
            heappush(self._marks, (self.steps + MARK_TOKENS, sequence.number, sequence))

    def leave(self, sequence: Sequence) -> None:
        """Take ``sequence`` off the clock and write its progress down."""
        sequence.tokens = sequence.base + self.steps
        sequence.computed = sequence.tokens - 1
        sequence.decoding = False
        self.size -= 1
        self.context -= sequence.computed
        self._residues[(1 - sequence.base) % self._block_size] -= 1

    def tokens(self, sequence: Sequence) -> int:
        """Return the tokens so far of a sequence, decoding or not."""
        return sequence.base + self.steps if sequence.decoding else sequence.tokens

    def advance(self, steps: int) -> None:
        """Count ``steps`` steps in which all decoded."""
        self.steps += steps
        self.context += steps * self.size

    def missed(self, sequence: Sequence) -> None:
        """Undo the last step for a sequence that did not decode in it."""
        self._residues[(1 - sequence.base) % self._block_size] -= 1
        sequence.base -= 1
        self.context -= 1
        self._residues[(1 - sequence.base) % self._block_size] += 1
        heappush(self._ends, (sequence.total_tokens - sequence.base, sequence.number, sequence))

    def blocks(self, first: int, count: int) -> int:
        """Return the blocks that the steps ``first`` to ``first + count - 1`` from now take."""
        rounds, rest = divmod(count, self._block_size)
        needed = rounds * self.size
        at = self.steps + first
        for step in range(at, at + rest):
            needed += self._residues[step % self._block_size]
        return needed

    def steps_within(self, free: int, first: int, most: int) -> int:
        """Return for how many steps, from step ``first`` on and up to ``most``, blocks suffice."""
        size = self._block_size
        if (most // size + 1) * self.size <= free:
            return most
        count = 0
        while count < most:
            free -= self._residues[(self.steps + first + count) % size]
            if free < 0:
                break
            count += 1
        return count

    def steps_to_end(self) -> int:
        """Return the steps until the first sequence ends; there must be one."""
        ends = self._ends
        while True:
            at, _, sequence = ends[0]
            if sequence.decoding and sequence.total_tokens - sequence.base == at:
                return at - self.steps
            heappop(ends)

    def marked(self, ahead: int) -> list[Sequence]:
        """Return the sequences that passed another mark by ``ahead`` steps from now."""
        marks, at, found = self._marks, self.steps + ahead, []
        while marks and marks[0][0] <= at:
            due, number, sequence = heappop(marks)
            if sequence.decoding:
                found.append(sequence)
                heappush(marks, (due + MARK_TOKENS, number, sequence))
        return found

    def ended(self) -> list[Sequence]:
        """Take off the clock and return those that have all their tokens, by admission."""
        ends, found = self._ends, []
        while ends and ends[0][0] <= self.steps:
            at, _, sequence = heappop(ends)
            if sequence.decoding and sequence.total_tokens - sequence.base == at:
                self.leave(sequence)
                found.append(sequence)
        return found


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
