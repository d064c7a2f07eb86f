"""Prompts computed by one engine, answers written by another (P/D disaggregation): who, and when.

Engines have roles. One for prefill computes prompts only; one for decode goes on from their KV;
all others do both, as ever. A call goes to an engine for both or to one for decode, whichever the
placement policy prefers. At one for decode, its prompt is computed by the prefill engine p with
the lowest price, unless the decode engine d itself is cheaper. In seconds::

    price(p) = ready + x * n_p * p1_p * uncached_p         ready: wait + prefill + a step at p
    price(d) = prefill_d + x * n_d * p1_d * uncached_d
    p computes it if  price(p) + move * uncached_d < price(d)

with n the calls on an engine, p1 its seconds for a prompt token, x the policy's weight of time
added to others (``externality``), and move the seconds in which the KV of a token reaches d: as
measured there (:class:`~hexgen_vllm.policy.engine_load.TransferRate`), until then as stated
(``kv_transfer_rate``). So a prompt that is short, or mostly in d's prefix cache, or that meets no
other calls there, is computed by d; and so are all while no prefill engine is at work.

:mod:`~hexgen_vllm.policy.marginal_cost` adds the same terms to its score of d: the finish is that
by way of p, and the delay to others is that at p for the prompt and at d for the answer only.

Starves: nothing. Cost: O(prefill engines) for each choice of an engine.
"""

from __future__ import annotations

from collections.abc import Sequence

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.policy.calls import Demand, Handover
from hexgen_vllm.policy.dispatch import costs
from hexgen_vllm.policy.engine_load import EngineLoad


def handover(
    demand: Demand, prefillers: Sequence[EngineLoad], options: DispatchOptions
) -> Handover | None:
    """Return the prompt of a call at the cheapest of ``prefillers``, ``None`` if there is none."""
    best: Handover | None = None
    x = options.externality
    for engine, cost in zip(prefillers, costs(prefillers), strict=True):
        forecast = engine.forecast(demand, cost, affinity=options.prefix_affinity)
        found = Handover(
            engine.engine_id,
            forecast.wait_s + forecast.prefill_s + cost.step_s(1),
            forecast.uncached_tokens,
            x * engine.calls * cost.p1,
            x,
            1.0 / options.kv_transfer_rate,
        )
        if best is None or found.price_s < best.price_s:
            best = found
    return best
