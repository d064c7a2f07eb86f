"""Byte arithmetic of KV pages: where a block's bytes lie, as runs.

A *run* is a stretch of bytes that is contiguous in every block; a block is one or more runs.
Everything here is integers: no torch, so that it can be read and tested alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from hexgen_vllm.errors import ConfigError

MAX_RUNS_PER_BLOCK = 65_536
"""More runs than this mean a layout whose elements are scattered one by one."""

MAX_ALIGNMENT = 16
"""Bytes of the widest load that a kernel issues."""


class Dim(NamedTuple):
    """One dimension of a page: its length and the bytes between two neighbours."""

    size: int
    stride_bytes: int


@dataclass(frozen=True)
class BlockRun:
    """``num_bytes`` bytes of every block.

    Block ``b`` holds them at ``address + b * block_stride_bytes``; a record holds them at
    ``record_offset``. All four are bytes.
    """

    address: int
    block_stride_bytes: int
    num_bytes: int
    record_offset: int


def page_runs(
    dims: Sequence[Dim], item_bytes: int, address: int, block_stride_bytes: int, record_offset: int
) -> list[BlockRun]:
    """Runs of one layer's page, in memory order.

    Args:
        dims: the page's dimensions, largest stride first, without those of length 1.
        item_bytes: bytes of one element.
        address: where block 0 starts.
        block_stride_bytes: bytes from one block to the next.
        record_offset: where the page starts in a record.

    Raises:
        ConfigError: the page falls into more than ``MAX_RUNS_PER_BLOCK`` runs.
    """
    outer = list(dims)
    run_bytes = item_bytes
    while outer and outer[-1].stride_bytes == run_bytes:
        run_bytes *= outer.pop().size
    count = math.prod(dim.size for dim in outer)
    if count > MAX_RUNS_PER_BLOCK:
        raise ConfigError(
            f"KV layout: a page of {count} separate runs of {run_bytes} bytes is too scattered, "
            f"the limit is {MAX_RUNS_PER_BLOCK} runs."
        )
    steps = itertools.product(*(range(dim.size) for dim in outer))
    return [
        BlockRun(
            address + sum(i * dim.stride_bytes for i, dim in zip(index, outer, strict=True)),
            block_stride_bytes,
            run_bytes,
            record_offset + number * run_bytes,
        )
        for number, index in enumerate(steps)
    ]


def merge_runs(runs: Iterable[BlockRun]) -> list[BlockRun]:
    """Join neighbours in the record that are neighbours in memory too.

    A cross-layer layout becomes one run per block; the record's bytes stay as they are.
    """
    merged: list[BlockRun] = []
    for run in runs:
        last = merged[-1] if merged else None
        if last is not None and _touches(last, run):
            merged[-1] = replace(last, num_bytes=last.num_bytes + run.num_bytes)
        else:
            merged.append(run)
    return merged


def _touches(first: BlockRun, second: BlockRun) -> bool:
    return (
        first.block_stride_bytes == second.block_stride_bytes
        and first.address + first.num_bytes == second.address
        and first.record_offset + first.num_bytes == second.record_offset
    )


def split_runs(runs: Iterable[BlockRun], piece_bytes: int) -> Iterator[BlockRun]:
    """Cut runs into pieces of at most ``piece_bytes`` bytes, the unit of work of a kernel."""
    for run in runs:
        for start in range(0, run.num_bytes, piece_bytes):
            yield BlockRun(
                run.address + start,
                run.block_stride_bytes,
                min(piece_bytes, run.num_bytes - start),
                run.record_offset + start,
            )


def alignment_of(values: Iterable[int]) -> int:
    """Largest power of two up to ``MAX_ALIGNMENT`` that divides every value."""
    return math.gcd(MAX_ALIGNMENT, *values)


def check_disjoint(runs: Sequence[BlockRun], num_blocks: int) -> None:
    """Refuse runs that share bytes between two blocks or two layers.

    Raises:
        ConfigError: two runs overlap; a scatter would then write one byte twice.
    """
    for cluster in _clusters(runs, num_blocks):
        if not _cluster_is_disjoint(cluster, num_blocks):
            raise ConfigError("KV layout: two blocks or two layers share bytes of memory.")


def _clusters(runs: Sequence[BlockRun], num_blocks: int) -> Iterator[list[BlockRun]]:
    """Groups of runs whose address ranges, over all blocks, intersect."""
    cluster: list[BlockRun] = []
    end = 0
    for run in sorted(runs, key=lambda run: run.address):
        if cluster and run.address >= end:
            yield cluster
            cluster = []
        cluster.append(run)
        end = max(end, run.address + (num_blocks - 1) * run.block_stride_bytes + run.num_bytes)
    if cluster:
        yield cluster


def _cluster_is_disjoint(cluster: Sequence[BlockRun], num_blocks: int) -> bool:
    """Interleaved runs never meet when they repeat at one stride and fit beside each other."""
    if num_blocks == 1:
        return len(cluster) == 1
    stride = cluster[0].block_stride_bytes
    if stride == 0 or any(run.block_stride_bytes != stride for run in cluster):
        return False
    origin = cluster[0].address
    spans = sorted(((run.address - origin) % stride, run.num_bytes) for run in cluster)
    starts = [start for start, _ in spans[1:]] + [spans[0][0] + stride]
    return all(start + size <= after for (start, size), after in zip(spans, starts, strict=True))
