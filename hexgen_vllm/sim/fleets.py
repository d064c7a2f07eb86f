"""Fleets to simulate where none is given.

:data:`DEVICES` holds Llama-3.1-70B on four devices. Prefill rates and the decode step at batch 1
are fitted to latencies published for HEXGEN-TEXT2SQL (arXiv 2505.05286). What that paper does not
give is assumed, and stated here, because results depend on it:

- An engine is four such GPUs with 16-bit weights (140 GB), tensor parallel. Published decode steps
  fit reading a quarter of the weights per GPU. 90 % of memory is used, 8 GB go to activations, a
  token's KV takes 327,680 bytes: KV for 427,000 tokens on 80 GB GPUs, 75,000 on 48 GB GPUs.
- A decoding token costs 0.6 of the arithmetic of a prompt token (c1 = 0.6 p1); the rest hides
  behind the reading of weights.
- Reading KV takes 327,680 bytes per context token from four GPUs at 70 % of their bandwidth (c2).
- Attention's quadratic part is within the measured prefill rates (p2 = 0), a step with prefill has
  no fixed extra cost (p0 = 0). Steps hold 2,048 tokens and 64 sequences.

For one's own fleet, measured step costs go into a YAML file; see :mod:`hexgen_vllm.sim.scenario`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from hexgen_vllm.sim.engine.sequence import EngineModel
from hexgen_vllm.types import StepCost

_GPUS: Final = 4
_KV_BYTES_PER_TOKEN: Final = 327_680
_USABLE: Final = 0.9
_WEIGHTS_GB: Final = 140.0
_ACTIVATIONS_GB: Final = 8.0
_BANDWIDTH_SHARE: Final = 0.7
_DECODE_SHARE: Final = 0.6
_USUAL_CONTEXT: Final = 5_000  # of the latencies that the decode step was fitted to
# name: devices and how many engines of each
FLEETS: Final[dict[str, tuple[tuple[str, int], ...]]] = {
    "reference-4": (("A100", 2), ("A6000", 1), ("L40S", 1)),
    "reference-8": (("A100", 4), ("A6000", 2), ("L40S", 2)),
}
_SLOTS: Final = 64


@dataclass(frozen=True, slots=True)
class GpuModel:
    """Four GPUs of one kind.

    Attributes:
        prefill_tokens_per_s: fitted to published latencies.
        decode_step_s: one sequence alone, fitted likewise.
        memory_gb, bandwidth_gb_s: of one GPU, from its data sheet.
    """

    prefill_tokens_per_s: float
    decode_step_s: float
    memory_gb: float
    bandwidth_gb_s: float

    def cost(self) -> StepCost:
        """Return the step cost."""
        p1 = 1.0 / self.prefill_tokens_per_s
        read_gb_s = _GPUS * self.bandwidth_gb_s * _BANDWIDTH_SHARE
        c1, c2 = _DECODE_SHARE * p1, _KV_BYTES_PER_TOKEN / (read_gb_s * 1e9)
        c0 = self.decode_step_s - c1 - c2 * _USUAL_CONTEXT
        return StepCost(c0=c0, c1=c1, c2=c2, p0=0.0, p1=p1, p2=0.0)

    def kv_tokens(self) -> int:
        """Return the tokens that the KV cache holds, in whole thousands."""
        free_gb = _GPUS * self.memory_gb * _USABLE - _WEIGHTS_GB - _ACTIVATIONS_GB
        return int(free_gb * 1e9 / _KV_BYTES_PER_TOKEN) // 1000 * 1000


DEVICES: Final[dict[str, GpuModel]] = {
    "A100": GpuModel(4_000, 0.0226, 80, 2_039),
    "H100": GpuModel(11_500, 0.0115, 80, 3_350),
    "A6000": GpuModel(1_200, 0.0370, 48, 768),
    "L40S": GpuModel(2_200, 0.0400, 48, 864),
}


def engine_on(device: str, engine_id: str) -> EngineModel:
    """Return an engine on a known device.

    Raises:
        KeyError: the device is not in :data:`DEVICES`.
    """
    known = DEVICES[device]
    return EngineModel(
        engine_id,
        known.cost(),
        device=device,
        max_num_seqs=_SLOTS,
        kv_tokens=known.kv_tokens(),
    )


def fleet(name: str) -> tuple[EngineModel, ...]:
    """Return a reference fleet; engines are named after their device, ``a100-0`` and so on.

    Raises:
        KeyError: there is no such fleet.
    """
    return tuple(
        engine_on(device, f"{device.lower()}-{index}")
        for device, count in FLEETS[name]
        for index in range(count)
    )
