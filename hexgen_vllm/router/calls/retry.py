"""When a call may be sent again, and after what wait."""

from __future__ import annotations

import random

from hexgen_vllm.router.options import RouterOptions


class RetryPolicy:
    """Bounds retries per call and, by a budget, per traffic.

    There is a stock of ``retry_budget_burst`` retries, enough for what waits on an engine that
    dies, and each call earns ``retry_budget_ratio`` of one; when everything fails, load does not
    multiply.

    Args:
        options: limits.
        rng: source of jitter.
    """

    def __init__(self, options: RouterOptions, rng: random.Random) -> None:
        self._options, self._rng = options, rng
        self._budget = options.retry_budget_burst

    def call_arrived(self) -> None:
        """Earn a share of a retry."""
        options = self._options
        self._budget = min(self._budget + options.retry_budget_ratio, options.retry_budget_burst)

    def allows(self, attempts: int) -> bool:
        """Take one retry from the budget for a call sent ``attempts`` times; false if it may not.

        Call it once per failure: it counts.
        """
        return self._takes_one(attempts - 1, self._options.retry_max_retries)

    def allows_migration(self, migrations: int) -> bool:
        """Take one retry for a stream that moved ``migrations`` times, as :meth:`allows`."""
        return self._takes_one(migrations, self._options.migration_limit)

    def _takes_one(self, before: int, most: int) -> bool:
        if self._options.disable_retries or before >= most or self._budget < 1.0:
            return False
        self._budget -= 1.0
        return True

    def backoff_s(self, attempts: int) -> float:
        """Return the wait before the next try of a call sent ``attempts`` times, seconds."""
        options = self._options
        grown = options.retry_initial_backoff_ms * options.retry_backoff_multiplier ** (
            attempts - 1
        )
        jitter = 1.0 + options.retry_jitter_factor * self._rng.uniform(-1.0, 1.0)
        return min(grown, options.retry_max_backoff_ms) * jitter / 1000.0
