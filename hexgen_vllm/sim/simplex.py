"""Linear programmes of a few dozen variables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from hexgen_vllm.errors import HexgenError

_ZERO: Final = 1e-12
_MOST_PIVOTS: Final = 10_000


def maximise(
    gains: Sequence[float], rows: Sequence[Sequence[float]], bounds: Sequence[float]
) -> float:
    """Return the largest ``gains·x`` with ``rows·x <= bounds`` and ``x >= 0``.

    The simplex method with Bland's rule, which cannot cycle.

    Args:
        gains: one per variable.
        rows: one per constraint, each with one coefficient per variable.
        bounds: one per constraint, none negative, so that x = 0 is feasible.

    Raises:
        HexgenError: the programme is unbounded.
    """
    count, variables = len(rows), len(gains)
    table = [
        [*map(float, row), *(float(i == j) for j in range(count)), float(bounds[i])]
        for i, row in enumerate(rows)
    ]
    table.append([*(-g for g in gains), *([0.0] * (count + 1))])
    basis = [variables + i for i in range(count)]
    for _ in range(_MOST_PIVOTS):
        entering = next((j for j, v in enumerate(table[-1][:-1]) if v < -_ZERO), None)
        if entering is None:
            return table[-1][-1]
        ratios = [
            (table[i][-1] / table[i][entering], basis[i], i)
            for i in range(count)
            if table[i][entering] > _ZERO
        ]
        if not ratios:
            raise HexgenError("the linear programme is unbounded")
        leaving = min(ratios)[2]
        _pivot(table, leaving, entering)
        basis[leaving] = entering
    raise HexgenError("the linear programme was not solved")


def _pivot(table: list[list[float]], leaving: int, entering: int) -> None:
    pivot = table[leaving][entering]
    table[leaving] = [v / pivot for v in table[leaving]]
    for i, row in enumerate(table):
        factor = row[entering]
        if i != leaving and factor:
            table[i] = [a - factor * b for a, b in zip(row, table[leaving], strict=True)]
