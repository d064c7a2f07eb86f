"""How much is tried: little and always the same in the test suite, more and at random on request.

HEXGEN_FUZZ=20 multiplies the examples of every test by 20 and draws new ones each time.
"""

from __future__ import annotations

import os
from typing import Final

from hypothesis import HealthCheck, settings

FACTOR: Final = float(os.environ.get("HEXGEN_FUZZ", "0"))


def budget(examples: int) -> settings:
    """Return settings of a test that tries ``examples`` inputs in the test suite."""
    return settings(
        max_examples=max(1, int(examples * (FACTOR or 1))),
        derandomize=not FACTOR,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
