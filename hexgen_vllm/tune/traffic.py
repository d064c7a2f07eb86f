"""What recent traffic looks like, and how well it is served."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from statistics import fmean, stdev
from typing import Final

from hexgen_vllm.recent import RecentWorkflow

_BLOCKS: Final = 8


@dataclass(frozen=True, slots=True)
class Traffic:
    """What traffic looks like: means over recent workflows."""

    rate_per_s: float
    calls: float
    prompt_tokens: float
    output_tokens: float

    def change_from(self, other: Traffic) -> float:
        """Return the largest relative change of any figure."""
        pairs: list[tuple[float, float]] = [
            (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)
        ]
        return max(abs(new - old) / max(abs(old), 1e-9) for new, old in pairs)


@dataclass(frozen=True, slots=True)
class Live:
    """A loss measured live, and its standard error."""

    loss: float
    spread: float


def relative(simulated: float, live: float) -> float:
    """Return the relative error of a simulated loss, ``inf`` when it cannot be told."""
    if not (math.isfinite(simulated) and math.isfinite(live)) or live == 0:
        return math.inf
    return abs(simulated / live - 1.0)


def traffic(workflows: Sequence[RecentWorkflow]) -> Traffic | None:
    """Return what recent workflows look like, ``None`` when they are too few to say."""
    times = [w.arrived_s for w in workflows]
    if len(times) < 2 or max(times) <= min(times):
        return None
    n = len(workflows)
    return Traffic(
        rate_per_s=(n - 1) / (max(times) - min(times)),
        calls=sum(len(w.calls) for w in workflows) / n,
        prompt_tokens=sum(c.prompt for w in workflows for c in w.calls) / n,
        output_tokens=sum(c.output for w in workflows for c in w.calls) / n,
    )


def live_loss(losses: Iterable[float]) -> Live:
    """Return mean and standard error of losses of blocks of workflows."""
    found = list(losses)
    if not found or not all(map(math.isfinite, found)):
        return Live(math.nan, math.inf)
    spread = stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.inf
    return Live(fmean(found), spread)


def blocks(workflows: Sequence[RecentWorkflow]) -> list[Sequence[RecentWorkflow]]:
    """Split workflows into eight blocks in order of arrival, fewer when they are few."""
    count = min(_BLOCKS, len(workflows))
    edges = [len(workflows) * i // count for i in range(count + 1)] if count else []
    return [workflows[a:b] for a, b in pairwise(edges)]
