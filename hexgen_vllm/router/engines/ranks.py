"""What calls are placed on: an engine, or one data-parallel rank of it.

The ranks of an engine share its address, health and fate, and nothing else: each has its own
scheduler and KV cache, so its own load, rates and prefixes. ``name@rank`` is a rank of engine
``name``; an engine with a single rank is its own target.
"""

from __future__ import annotations

from typing import Final

RANK_HEADER: Final = "x-data-parallel-rank"
"""Tells vLLM which rank a call is for."""

_MARK: Final = "@"  # no engine's name has one


def targets_of(worker: str, ranks: int) -> tuple[str, ...]:
    """Return the names of the targets of an engine with ``ranks`` ranks."""
    return tuple(f"{worker}{_MARK}{rank}" for rank in range(ranks)) if ranks > 1 else (worker,)


def worker_of(target: str) -> str:
    """Return the name of the engine that ``target`` belongs to."""
    return target.partition(_MARK)[0]


def rank_of(target: str) -> str:
    """Return the rank of ``target`` as vLLM is told it, empty where there is but one."""
    return target.partition(_MARK)[2]
