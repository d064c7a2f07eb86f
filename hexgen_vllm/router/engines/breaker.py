"""A circuit breaker: an engine that keeps failing gets no calls for a while, then one at a time.

    closed ──failures in a row, or a share of recent calls──► open
    open   ──after a while, or a sign of life──► trial
    trial  ──successes──► closed        ──a failure──► open

It knows no clock: times are passed in.
"""

from __future__ import annotations

import enum

from hexgen_vllm.router.options import RouterOptions


class BreakerState(enum.Enum):
    """Whether calls may pass."""

    CLOSED = "closed"  # they may
    OPEN = "open"
    TRIAL = "trial"  # one at a time


class Breaker:
    """Counts how the calls of one engine ended.

    Attributes:
        state: whether calls may pass.
    """

    def __init__(self, options: RouterOptions) -> None:
        self._options = options
        self.state = BreakerState.CLOSED
        self._in_a_row = self._passed = 0
        self._good, self._bad = [0, 0], [0, 0]  # in this half of the window and the one before
        self._half_until_s = 0.0
        self._open_until_s = 0.0

    @property
    def bad_share(self) -> float:
        """Share of recent calls that failed, 0 if there were none."""
        bad, good = sum(self._bad), sum(self._good)
        return bad / (bad + good) if bad else 0.0

    def succeeded(self) -> None:
        """Note a call that the engine answered."""
        self._in_a_row = 0
        self._good[0] += 1
        if self.state is BreakerState.TRIAL:
            self._passed += 1
            if self._passed >= self._options.cb_success_threshold:
                self.close()

    def failed(self, now: float) -> bool:
        """Note a call that the engine failed; return whether that is one too many."""
        self._in_a_row += 1
        self._bad[0] += 1
        if self._options.disable_circuit_breaker:
            return False
        return self.state is BreakerState.TRIAL or self._too_many()

    def open(self, now: float) -> None:
        """Let no calls pass for a while."""
        self.state = BreakerState.OPEN
        self._open_until_s = now + self._options.cb_timeout_duration_secs

    def half_open(self) -> None:
        """Let calls pass one at a time."""
        self.state, self._passed = BreakerState.TRIAL, 0

    def close(self) -> None:
        """Let calls pass, and forget what was."""
        self.state, self._in_a_row = BreakerState.CLOSED, 0
        self._good, self._bad = [0, 0], [0, 0]

    def tick(self, now: float) -> None:
        """Do what time alone causes."""
        if now >= self._half_until_s:
            self._half_until_s = now + self._options.cb_window_duration_secs / 2
            self._good, self._bad = [0, self._good[0]], [0, self._bad[0]]
        if self.state is BreakerState.OPEN and now >= self._open_until_s:
            self.half_open()

    def _too_many(self) -> bool:
        options, bad = self._options, sum(self._bad)
        calls = bad + sum(self._good)
        if self._in_a_row >= options.cb_failure_threshold:
            return True
        enough = options.cb_error_ratio < 1.0 and calls >= options.cb_least_calls
        return enough and bad >= options.cb_error_ratio * calls
