"""What tests of real engines need of the CPU worker and vLLM itself does not offer there.

The worker's asynchronous path wants CUDA streams and events. On a CPU nothing runs beside the
host, so objects that do nothing are right; what is tested is the scheduler, one step ahead of the
outputs it has seen.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from vllm.platforms.cpu import CpuPlatform


class Nothing:
    """A stream or an event of a device on which everything is already done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


_override_kernels = functools.cache(CpuPlatform.register_triton_kernel_overrides)


def allow_many(patch: pytest.MonkeyPatch) -> None:
    """Let several engines start in one process, until ``patch`` is undone.

    vLLM looks for kernels to replace in every loaded module, and the second time fails at one of
    numba's, which n-gram drafting loads. Once for each process is enough.
    """

    def once(cls: type) -> None:
        del cls
        _override_kernels()

    patch.setattr(CpuPlatform, "register_triton_kernel_overrides", classmethod(once))


def allow_async(patch: pytest.MonkeyPatch) -> None:
    """Let vLLM's CPU platform keep ``async_scheduling``, until ``patch`` is undone."""
    check = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def keep(cls: type, vllm_config: Any) -> None:
        wanted = vllm_config.scheduler_config.async_scheduling
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    patch.setattr(CpuPlatform, "check_and_update_config", classmethod(keep))
    patch.setattr(torch.cuda, "Event", Nothing)
    patch.setattr(torch.cuda, "Stream", Nothing)
    patch.setattr(torch.cuda, "current_stream", Nothing)
    patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
