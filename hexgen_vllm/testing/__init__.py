"""Doubles for tests of this package and of what is built on it."""

from __future__ import annotations

from hexgen_vllm.testing.manual_clock import ManualClock

__all__ = ["ManualClock"]
