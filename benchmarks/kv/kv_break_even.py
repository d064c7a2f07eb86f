"""``bench kv``, third part: from which context on copying KV beats computing it again.

For each size of model the copies are measured with its own pages. Computing is taken from the
speed of a large matrix product on the same device, which a real prefill does not exceed: where
copying wins here, it wins by more in an engine. Both go through the engine's own formula
(:func:`hexgen_vllm.policy.retention.weigh`), with nothing left in the prefix cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from benchmarks.kv import kv_beside, kv_sweep
from hexgen_vllm.policy.retention import CopyRates, Held, RecomputeRates, Retention, weigh

if TYPE_CHECKING:  # these load torch
    from benchmarks.kv.subjects import CopyBed, Way

CONTEXTS: Final = (256, 1024, 4096, 16384, 65536)
BLOCK_TOKENS: Final = 16
COPIED_BYTES: Final = {"cpu": 64 << 20, "cuda": 512 << 20}
_POWERS: Final = tuple(1 << i for i in range(21))


@dataclass(frozen=True)
class Model:
    """What the cost of a model's KV depends on; ``heads`` are those of queries."""

    name: str
    parameters: float
    layers: int
    kv_heads: int
    head_size: int
    heads: int


MODELS: Final = (
    Model("Qwen2.5-0.5B", 0.49e9, 24, 2, 64, 14),
    Model("Llama-3.2-1B", 1.24e9, 16, 8, 64, 32),
    Model("Llama-3.1-8B", 8.03e9, 32, 8, 128, 32),
    Model("Qwen2.5-32B", 32.8e9, 64, 8, 128, 40),
    Model("Llama-3.1-70B", 70.6e9, 80, 8, 128, 64),
)


@dataclass(frozen=True)
class Line:
    """One model; lists run over ``CONTEXTS``.

    Attributes:
        model: its name.
        token_bytes: bytes of KV per token.
        save_gb_per_s: measured with pages of this model.
        restore_gb_per_s: the same.
        recompute_ms: time of computing a context again.
        copy_ms: time that saving and restoring it takes from the engine.
        from_tokens: least power of two of tokens that ``auto`` keeps, ``None`` if there is none.
    """

    model: str
    token_bytes: int
    save_gb_per_s: float
    restore_gb_per_s: float
    recompute_ms: list[float]
    copy_ms: list[float]
    from_tokens: int | None


def measure(device: str, models: Sequence[Model] = MODELS) -> list[Line]:
    """Measure the device, and print and return the table."""
    from benchmarks.kv import probes

    probe = probes.prefill(device)
    flops = probe.flops / kv_beside.median_s(probe.step, 5)
    print(f"copying against computing at {flops / 1e12:.2f} TFLOP/s, ms copy/compute")
    print(f"  {'model':<15}" + "".join(f"{c:>20,}" for c in CONTEXTS) + "   keeps from tokens")
    lines = []
    for model in models:
        speeds = _speeds(model, device, probe.item_bytes)
        lines.append(line(model, probe.item_bytes, flops, speeds, beside=device != "cpu"))
        print(_text(lines[-1]), flush=True)
    return lines


def line(
    model: Model, item_bytes: int, flops: float, speeds: tuple[float, float], *, beside: bool
) -> Line:
    """Return the table's line of ``model``.

    Args:
        model: the model.
        item_bytes: bytes of a number in its KV.
        flops: floating-point operations per second.
        speeds: GB/s of saving and of restoring.
        beside: whether copies run beside the forward pass.
    """
    from hexgen_vllm.kernels.staging import LEAST_STAGING_BYTES

    token_bytes = 2 * model.layers * model.kv_heads * model.head_size * item_bytes
    again = RecomputeRates(
        token_s=2 * model.parameters / flops,
        context_s=4 * model.layers * model.heads * model.head_size / flops,
    )
    staging = LEAST_STAGING_BYTES if beside else 0
    copy = CopyRates(1e9 * speeds[0], 1e9 * speeds[1], beside=beside, staging_bytes=staging)

    def decided(tokens: int) -> Retention:
        return weigh(Held(tokens, 0, token_bytes), again, copy)

    found = [decided(tokens) for tokens in CONTEXTS]
    return Line(
        model.name,
        token_bytes,
        *speeds,
        [1e3 * d.recompute_s for d in found],
        [1e3 * d.copy_s for d in found],
        next((tokens for tokens in _POWERS if decided(tokens).keep), None),
    )


def _speeds(model: Model, device: str, item_bytes: int) -> tuple[float, float]:
    """Return GB/s of the engine's way to copy, with as many blocks as are allowed."""
    from benchmarks.kv.subjects import CopyBed, CopyCase

    page_bytes = 2 * BLOCK_TOKENS * model.kv_heads * model.head_size * item_bytes
    blocks = COPIED_BYTES[device.partition(":")[0]] // (page_bytes * model.layers)
    bed = CopyBed(CopyCase(page_bytes, max(blocks, 1), model.layers), device)
    return kv_sweep.speeds(bed, engines_way(bed))


def engines_way(bed: CopyBed) -> Way:
    """Return how an engine copies in this place."""
    ways = {way.name: way for way in bed.ways()}
    return next(ways[name] for name in kv_beside.ENGINE_WAYS if name in ways)


def _text(row: Line) -> str:
    pairs = zip(row.copy_ms, row.recompute_ms, strict=True)
    cells = "".join(f"{f'{_ms(copy)}/{_ms(again)}':>20}" for copy, again in pairs)
    starts = "never" if row.from_tokens is None else f"{row.from_tokens:,}"
    return f"  {row.model:<15}{cells}   {starts}"


def _ms(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"
