"""When an engine that has calls and says nothing is taken for stalled.

One step may take long: kernels are compiled in the first one, a long prompt is prefilled whole, an
adapter is loaded, a CPU is busy. So the time of silence alone tells little. What counts beside it:

| evidence | the silence that is borne |
|---|---|
| it has worked, and its health check fails now | W |
| its health check passes: somebody there still works | 3 x W |
| it has done nothing since it started | at least ``cold_s`` |
| no other engine could take its calls, its health check fails | at least ``cold_s`` |
| no other engine could take its calls, its health check passes | any |

with W = ``least_s`` + ``steps`` x (its step) + 2 x (prefill that waits there), or 3 x the longest
silence that it came back from if that is more.

Wherever its health check fails, every silence ends: a process that was stopped is found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

_HEALTHY: Final = 3.0
_SEEN: Final = 3.0
_PREFILLS: Final = 2.0


@dataclass(frozen=True, slots=True)
class Patience:
    """How long engines may be silent.

    Attributes:
        least_s: silence that is always borne, seconds; 0 bears any.
        steps: predicted steps that are borne beside it.
        cold_s: silence that is borne of an engine that has done nothing yet, seconds.
    """

    least_s: float
    steps: float
    cold_s: float


@dataclass(frozen=True, slots=True)
class Silence:
    """What is known of an engine that has calls and shows no sign of work.

    Attributes:
        warm: it has run a step or sent a token since it started.
        healthy: its latest health check was answered in time.
        others: another engine, which works, could take its calls.
        step_s: predicted time of a step with its present calls, seconds.
        prefill_s: predicted time of the prompts that wait there, seconds.
        longest_s: longest silence at work that it has come back from, seconds.
    """

    warm: bool = True
    healthy: bool = True
    others: bool = True
    step_s: float = 0.0
    prefill_s: float = 0.0
    longest_s: float = 0.0


def borne_s(patience: Patience, silence: Silence) -> float:
    """Return the silence after which an engine is stalled, seconds; ``inf`` for never."""
    if not patience.least_s:
        return math.inf
    work_s = patience.least_s + patience.steps * silence.step_s + _PREFILLS * silence.prefill_s
    limit_s = max(work_s, min(_SEEN * silence.longest_s, patience.cold_s))
    if silence.healthy:
        limit_s *= _HEALTHY
    if not silence.warm:
        limit_s = max(limit_s, patience.cold_s)
    if not silence.others:
        limit_s = math.inf if silence.healthy else max(limit_s, patience.cold_s)
    return limit_s


def deaf_is_down(
    patience: Patience, *, failing_s: float, worked_s: float, others: bool, warm: bool
) -> bool:
    """Whether an engine whose health checks time out again and again gets no more calls.

    Probes queue behind a load, and a process that compiles may answer nothing for minutes. An
    engine that refuses connections, or says that it is not well, needs no such patience.

    Args:
        patience: how long engines may be silent.
        failing_s: since its first failed check in a row, seconds.
        worked_s: since its last sign of work, seconds; ``inf`` if there was none.
        others: another engine, which works, could take its calls.
        warm: it has run a step or sent a token since it started.
    """
    limit_s = patience.cold_s
    if others:
        limit_s = patience.least_s if warm else patience.cold_s / 4.0
    return min(failing_s, worked_s) > limit_s
