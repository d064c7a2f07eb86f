"""Deadline-aware serving of agentic LLM workflows on vLLM.

Public names are loaded on first use, so that importing the package needs neither torch nor vLLM.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hexgen_vllm.client import Workflow
    from hexgen_vllm.client.sampling import with_deadline

__version__ = "0.1.0"

_HOMES = {
    "UrgencyScheduler": "hexgen_vllm.engine.scheduler",
    "Workflow": "hexgen_vllm.client",
    "with_deadline": "hexgen_vllm.client.sampling",
}

__all__ = ["UrgencyScheduler", "Workflow", "__version__", "with_deadline"]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
