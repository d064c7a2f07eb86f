"""Asynchronous scheduling on the CPU worker, which vLLM switches off there: for tests only.

The worker's asynchronous path wants CUDA streams and events. On a CPU nothing runs beside the
host, so objects that do nothing are right; what is tested is the scheduler, one step ahead of the
outputs it has seen.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch


class Nothing:
    """A stream or an event of a device on which everything is already done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def allow(patch: pytest.MonkeyPatch) -> None:
    """Let vLLM's CPU platform keep ``async_scheduling``, until ``patch`` is undone."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def keep(cls: type, vllm_config: Any) -> None:
        wanted = vllm_config.scheduler_config.async_scheduling
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    patch.setattr(CpuPlatform, "check_and_update_config", classmethod(keep))
    patch.setattr(torch.cuda, "Event", Nothing)
    patch.setattr(torch.cuda, "Stream", Nothing)
    patch.setattr(torch.cuda, "current_stream", Nothing)
    patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
