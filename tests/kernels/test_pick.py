"""Which twin serves a cache, and what is said about it."""

from __future__ import annotations

import logging

import pytest
import torch

from hexgen_vllm import kernels
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.kernels import cpu, reference, triton_copy
from hexgen_vllm.kernels.libraries import Loaded

HOST = torch.device("cpu")


@pytest.fixture(autouse=True)
def _forget_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEXGEN_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernels._pick.cache_clear()
    kernels._failing.cache_clear()


def test_the_native_library_serves_the_host_and_is_named_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="hexgen_vllm.kernels"):
        assert kernels.pick_kernel(HOST) is cpu
        assert kernels.pick_kernel(HOST) is cpu
    assert [record.getMessage() for record in caplog.records] == [
        "KV block copies on cpu: cpu kernel"
    ]


def test_without_a_library_the_reference_serves_and_the_log_says_why(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "cpu_library", lambda: Loaded(None, "no compiler was found"))
    with caplog.at_level(logging.INFO, logger="hexgen_vllm.kernels"):
        assert kernels.pick_kernel(HOST) is reference
    assert "(cpu: no compiler was found)" in caplog.text


def test_the_interpreter_is_never_picked_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "triton" in kernels.available_kernels(HOST)
    assert kernels.pick_kernel(HOST) is cpu


def test_the_environment_names_a_kernel_and_the_argument_wins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HEXGEN_KERNELS", "reference")
    assert kernels.pick_kernel(HOST) is reference
    assert kernels.pick_kernel(HOST, "cpu") is cpu


def test_a_kernel_that_cannot_serve_is_refused() -> None:
    with pytest.raises(ConfigError, match="kernel cuda: the cuda kernel cannot reach"):
        kernels.pick_kernel(HOST, "cuda")
    with pytest.raises(ConfigError, match="needs a GPU, or TRITON_INTERPRET=1"):
        kernels.pick_kernel(HOST, "triton")
    with pytest.raises(ConfigError, match="'fast' is none of cuda, triton, batch, cpu, reference"):
        kernels.pick_kernel(HOST, "fast")


def test_a_twin_called_directly_refuses_too() -> None:
    layout = kernels.BlockLayout.from_tensors([torch.zeros(2, 16)])
    out = torch.empty(64, dtype=torch.uint8)
    with pytest.raises(ConfigError, match="kernel triton"):
        triton_copy.copy_blocks(layout, torch.tensor([0]), out, to_records=True)


def test_other_devices_fall_back_to_the_reference() -> None:
    assert kernels.pick_kernel(torch.device("meta")) is reference


def test_description_names_the_kernel_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.describe().startswith("cpu: cpu kernel")
    monkeypatch.setattr(cpu, "cpu_library", lambda: Loaded(None, "no compiler was found"))
    assert kernels.describe().startswith("cpu: reference kernel (cpu: no compiler was found)")


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (RuntimeError("CUDA refused a copy: no kernel image is available"), "no kernel image"),
        (OSError("driver too old"), "driver too old"),
        (None, "copies wrong bytes"),
    ],
)
def test_a_twin_that_loads_but_cannot_run_is_passed_over(
    broken: Exception | None,
    says: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def copy_blocks(*arguments: object, **more: object) -> None:
        if broken is not None:
            raise broken

    monkeypatch.setattr(cpu, "copy_blocks", copy_blocks)
    with caplog.at_level(logging.INFO, logger="hexgen_vllm.kernels"):
        assert kernels.pick_kernel(HOST) is reference
    assert says in caplog.text
    assert "cpu" not in kernels.available_kernels(HOST)
    kernels._failing.cache_clear()
