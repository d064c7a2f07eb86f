"""What other routers have placed on an engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Elsewhere(NamedTuple):
    """Load on an engine that this coordinator has not placed.

    Attributes:
        calls: in flight.
        prefill_tokens: prompt tokens of calls without a first token.
        context_tokens: prompt tokens of all of them.
        output_tokens: output tokens to come.
    """

    calls: int = 0
    prefill_tokens: int = 0
    context_tokens: int = 0
    output_tokens: int = 0

    @classmethod
    def total(cls, parts: Iterable[Elsewhere]) -> Elsewhere:
        """Return the sum of ``parts``."""
        columns = list(zip(*parts, strict=True))
        return cls(*(sum(column) for column in columns)) if columns else cls()
