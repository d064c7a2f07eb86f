"""What became of the KV that was copied to host memory, and how fast it was copied."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Final

from hexgen_vllm.engine.swap.messages import SwapReport
from hexgen_vllm.engine.swap.pool import HostCopy
from hexgen_vllm.policy.retention import ReturnSurvival

_DECAY: Final = 0.9
_WEIGHT: Final = 0.1
_MOST_SLOWER: Final = 4.0
_FIRST_HEAD_RISK: Final = 0.1


class Bandwidth:
    """Bytes per second of recent copies in one direction.

    A copy that took far longer than those before counts as a few times as long only: were it
    believed, one pause of the process would make copies look so slow that none is made any more,
    and none would show that they are not.
    """

    def __init__(self) -> None:
        self._bytes = self._seconds = 0.0

    def observe(self, num_bytes: int, seconds: float) -> None:
        """Learn that a copy took ``seconds``; nothing copied teaches nothing."""
        if num_bytes > 0 and 0.0 < seconds < math.inf:
            usual = self.rate()
            if usual is not None:
                seconds = min(seconds, _MOST_SLOWER * num_bytes / usual)
            self._bytes = _DECAY * self._bytes + num_bytes
            self._seconds = _DECAY * self._seconds + seconds

    def rate(self) -> float | None:
        """Return bytes per second, ``None`` while unknown."""
        return self._bytes / self._seconds if self._seconds else None


class SwapLedger:
    """Counts since start, and running means.

    Args:
        block_size: tokens per block.
        block_bytes: bytes per block on all workers together.

    Attributes:
        out: bandwidth to host memory.
        back: bandwidth back to the device.
        survival: share of unshared KV that the prefix cache still held when it was wanted.
        head_risk: how often shared KV was gone by then.
        returns: share of what ended calls left that the prefix cache still held when a call came
            back for it.
        staging_bytes: device memory that saves pass through.
        pack_bytes_per_s: how fast they get there, ``None`` while unknown.
    """

    def __init__(self, block_size: int, block_bytes: int) -> None:
        self._block_size, self._block_bytes = block_size, block_bytes
        self.out, self.back = Bandwidth(), Bandwidth()
        self.survival = 0.0
        self.head_risk = _FIRST_HEAD_RISK
        self.returns = ReturnSurvival()
        self.staging_bytes = 0
        self.pack_bytes_per_s: float | None = None
        self._tokens: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()

    def reported(self, report: SwapReport) -> None:
        """Take in what workers measured."""
        if report.staging_bytes:
            self.staging_bytes = report.staging_bytes
            self.pack_bytes_per_s = report.pack_bytes_per_s or None
        self.out.observe(report.out_bytes, report.out_s)
        self.back.observe(report.in_bytes, report.in_s)

    def saved(self, tokens: int, blocks: int) -> None:
        """Note that ``tokens`` tokens are saved in ``blocks`` blocks."""
        self._tokens["saved"] += tokens
        self._tokens["saved_bytes"] += blocks * self._block_bytes

    def resumed(self, copy: HostCopy, wanted: int, tokens: int, blocks: int) -> None:
        """Note that a call goes on from its copy.

        Args:
            copy: its copy.
            wanted: tokens of KV that it can use, from its start.
            tokens: tokens that are loaded.
            blocks: blocks that are loaded.
        """
        self._tokens["cached"] += copy.local - copy.first_block * self._block_size
        self._tokens["restored"] += tokens
        self._tokens["restored_bytes"] += blocks * self._block_bytes
        self._look(copy, wanted)

    def found(self, tokens: int, blocks: int) -> None:
        """Note that a call loads ``tokens`` tokens that an ended one has left."""
        self._tokens["found"] += tokens
        self._tokens["restored_bytes"] += blocks * self._block_bytes

    def headless(self, copy: HostCopy) -> None:
        """Note that a copy is of no use, because the shared head that it leaves out is gone."""
        self._look(copy, copy.tokens)
        self.dropped(copy, "headless")

    def _look(self, copy: HostCopy, wanted: int) -> None:
        """Learn from what the prefix cache holds of a call that comes back."""
        shared = copy.shared_blocks * self._block_size
        if shared:
            self.head_risk += _WEIGHT * ((copy.local < shared) - self.head_risk)
        if copy.local >= shared:
            found = (copy.local - shared) / max(wanted - shared, 1)
            self.survival += _WEIGHT * (min(found, 1.0) - self.survival)

    def dropped(self, copy: HostCopy, why: str) -> None:
        """Note that a copy went unused."""
        self._dropped[why] += copy.tokens - copy.first_block * self._block_size

    def refused(self, tokens: int, why: str) -> None:
        """Note that ``tokens`` tokens of KV are not kept."""
        self._refused[why] += tokens

    def stats(self) -> dict[str, Any]:
        """Return everything as plain JSON values; ``None`` means unknown.

        ``cached_tokens`` were saved and then found in the prefix cache; ``dropped_tokens`` were
        saved in vain and ``refused_tokens`` not saved at all, by reason.
        """
        return {
            "saved_tokens": self._tokens["saved"],
            "saved_bytes": self._tokens["saved_bytes"],
            "restored_tokens": self._tokens["restored"],
            "restored_bytes": self._tokens["restored_bytes"],
            "cached_tokens": self._tokens["cached"],
            "dropped_tokens": dict(self._dropped),
            "refused_tokens": dict(self._refused),
            "save_bytes_per_s": self.out.rate(),
            "restore_bytes_per_s": self.back.rate(),
            "found_tokens": self._tokens["found"],
            "survival": self.survival,
            "return_survival": self.returns.mean,
            "head_risk": self.head_risk,
        }
