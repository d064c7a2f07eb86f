"""KV of preempted calls in host memory: copied or computed again, by the live engine's rule.

Host memory is taken for unlimited and copies for as fast out as in; both hold up the step that
they are part of. The device's prefix cache is taken to have lost what was preempted by the time
it is wanted, which the live engine learns instead.
"""

from __future__ import annotations

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.policy.retention import CopyRates, Held, RecomputeRates, Retention, weigh
from hexgen_vllm.policy.service import ServiceRates
from hexgen_vllm.sim.model import EngineModel
from hexgen_vllm.sim.prefix_cache import BlockPool
from hexgen_vllm.sim.sequence import Sequence


class Keeper:
    """Decides about one engine's preempted calls.

    Args:
        tokens_per_s: KV copied each way.
        keep: ``auto``, ``always`` or ``never``.
        block_size: tokens of a KV block.
    """

    def __init__(self, tokens_per_s: float, keep: str, block_size: int) -> None:
        self._rate, self._keep, self._block_size = tokens_per_s, keep, block_size
        self._copy = CopyRates(tokens_per_s, tokens_per_s)

    def keep(self, sequence: Sequence, pool: BlockPool, rates: ServiceRates) -> int:
        """Let a call that is preempted keep its KV if that pays; return the tokens to copy."""
        tokens = sequence.computed
        blocks = max(-(-tokens // self._block_size), 1)
        own = tokens * pool.exclusive(sequence.holding, blocks, ()).held // blocks
        if not self.weigh(tokens, tokens - own, rates).keep:
            return 0
        sequence.saved_tokens = tokens
        return own

    def weigh(self, tokens: int, shared: int, rates: ServiceRates) -> Retention:
        """Return what becomes of ``tokens`` tokens of KV, ``shared`` of them held by others."""
        again = RecomputeRates(rates.prefill_token_s, rates.prefill_context_s)
        return weigh(Held(tokens, shared, 1.0), again, self._copy, self._keep)

    def seconds(self, tokens: int) -> float:
        """Return the time of copying ``tokens`` tokens one way."""
        return tokens / self._rate


def keeper_of(model: EngineModel, options: EngineOptions) -> Keeper | None:
    """Return the keeper of an engine, ``None`` where KV is always computed again."""
    rate = model.kv_copy_tokens_per_s
    return None if rate is None else Keeper(rate, options.keep_kv, model.block_size)
