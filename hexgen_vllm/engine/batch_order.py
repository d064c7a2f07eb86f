"""The order of vLLM's batch: who gets tokens first, and who gives way when KV blocks run out.

vLLM walks through ``running`` from the front, hands out the step's token budget, and preempts the
last call when a block is missing. An order that decides nothing is not made: walking through the
calls in the order in which they lie in memory is measurably faster.

* Blocks may run out in this step, or decodes alone may use up the budget: by key, so that the
  most urgent call is served first and the least urgent one gives way.
* Otherwise decodes go before prefill chunks, and chunks by key: a chunk takes whatever budget
  there is, and a decode beside it costs almost nothing.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, Final

from hexgen_vllm.engine.compat import Request

_KEY: Final = attrgetter("hexgen.rank", "hexgen.key_s")


def by_key(running: list[Request]) -> None:
    """Put the most urgent call first."""
    running.sort(key=_KEY)


def arrange(scheduler: Any) -> None:
    """Put ``scheduler.running`` in the order that this step needs."""
    running = scheduler.running
    chunks = [r for r in running if r.is_prefill_chunk]
    if _is_short(scheduler, bool(chunks)):
        by_key(running)
    elif chunks:
        by_key(chunks)
        running[:] = [r for r in running if not r.is_prefill_chunk] + chunks


def may_run_short(scheduler: Any) -> bool:
    """Return whether blocks, or tokens for decodes, may not suffice for the whole batch."""
    return _is_short(scheduler, any(r.is_prefill_chunk for r in scheduler.running))


def growth(scheduler: Any) -> int:
    """Return the blocks that the batch takes in this step."""
    return sum(growth_of(scheduler, request) for request in scheduler.running)


def growth_of(scheduler: Any, request: Request) -> int:
    """Return the blocks that a running call takes in this step."""
    if request.is_prefill_chunk:
        return int(scheduler._request_remaining_blocks(request))
    groups = len(scheduler.kv_cache_config.kv_cache_groups)
    spare = -request.num_computed_tokens % scheduler.block_size
    return groups * (spare <= scheduler.num_spec_tokens)


def _is_short(scheduler: Any, has_chunks: bool) -> bool:
    size, budget = scheduler.block_size, scheduler.max_num_scheduled_tokens
    each = 1 + scheduler.num_spec_tokens
    decodes = len(scheduler.running)
    blocks = decodes * (1 + each // size) + (budget // size + 1 if has_chunks else 0)
    groups = len(scheduler.kv_cache_config.kv_cache_groups)
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    return bool(free < groups * blocks or decodes * each >= budget)
