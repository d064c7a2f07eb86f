"""vLLM's asynchronous scheduling on the CPU worker, which vLLM itself does not offer.

The worker's code is the GPU's; what it does in streams there happens at once here. The scheduler
runs one step ahead all the same.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from vllm.platforms.cpu import CpuPlatform


class Placeholder:
    """Stands for a CUDA stream or event."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def register_once(patch: pytest.MonkeyPatch) -> None:
    """Let several engines start in one process: vLLM's second look at all loaded modules fails
    where numba is one of them, which n-gram speculation loads."""
    register = CpuPlatform.register_triton_kernel_overrides
    done: list[bool] = []

    def once(cls: Any) -> None:
        del cls
        if not done:
            register()
            done.append(True)

    patch.setattr(CpuPlatform, "register_triton_kernel_overrides", classmethod(once))


def allow(patch: pytest.MonkeyPatch) -> None:
    """Let the CPU platform keep asynchronous scheduling if it was asked for."""
    check = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def keeping(cls: Any, vllm_config: Any) -> None:
        wanted = vllm_config.scheduler_config.async_scheduling
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    patch.setattr(CpuPlatform, "check_and_update_config", classmethod(keeping))
    patch.setattr(torch.cuda, "Event", Placeholder)
    patch.setattr(torch.cuda, "Stream", Placeholder)
    patch.setattr(torch.cuda, "current_stream", lambda *_: Placeholder())
    patch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
