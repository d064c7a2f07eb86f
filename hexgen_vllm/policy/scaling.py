"""How many engines of each type there should be: the fewest that keep what is predicted on time.

A fluid prediction over the ``horizon_s`` seconds from when new engines could serve. Engines n, of
which each type t serves μ_t calls per second with all slots in use, of which a share ``load`` is
counted on, without those that find no place to run:

    C(n) = load * Σ n_t μ_t
    Q = max(waiting + (λ - C(present)) * start_s, 0)      calls waiting when the new ones are there
    L(n) = max(Q + (λ - C(n)) * horizon_s, 0)             and when the horizon is over
    value(n) = min(Q / horizon_s + λ, C(n)) * (w + (1 - w) * P(slack >= max(Q, L) / C | slack >= 0))

The last factor is the share of calls that are then on time; a late answer is worth w of one on
time, so that an overload without hope still adds engines. Slack is that of the calls open now;
what is late already cannot be helped and adds none. So a backlog that will be done in time, or
that is gone before a new engine could help, adds nothing either.

Calls that have waited all the time lately show what the engines can really do. Where that is less
than the measured rates say, as of engines that share a machine, all are taken for that much less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from hexgen_vllm.option import check, option

_EPSILON: Final = 1e-9
_Counts = dict[str, int]


@dataclass(frozen=True)
class ScalingOptions:
    """When engines are added and removed."""

    horizon_s: float = option(
        60.0,
        "how far ahead is predicted, and time over which arrivals are smoothed, seconds",
        least=1.0,
    )
    up_load: float = option(0.8, "share of the engines' capacity to count on", least=0.05, most=1.0)
    down_load: float = option(
        0.5, "the same, when asking whether fewer would do", least=0.05, most=1.0
    )
    tolerance: float = option(
        0.05, "share of the best value that engines are saved for", least=0.0, most=0.9
    )
    late_worth: float = option(0.1, "worth of a late answer", least=0.0, most=1.0)
    cooldown_s: float = option(30.0, "least time between two changes, seconds", least=0.0)
    down_after_s: float = option(
        120.0, "time for which fewer must do before one goes, seconds", least=0.0
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True)
class EngineType:
    """Engines that are alike.

    Attributes:
        name: what answers call it.
        count: engines that serve or are being started.
        serving: those of them that serve.
        least: fewest there may be.
        most: most there may be.
        calls_per_s: what one serves with all slots in use; ``None`` while nobody has measured.
        placeless: engines among ``count`` that wait for a place to run. They are counted on for
            nothing, and more of the kind are not asked for.
    """

    name: str
    count: int
    serving: int
    least: int
    most: int
    calls_per_s: float | None
    placeless: int = 0


@dataclass(frozen=True, slots=True)
class OfferedLoad:
    """What the engines have to do.

    Attributes:
        arrivals_per_s: λ, calls per second, smoothed.
        waiting: calls that no engine works on yet.
        slack: open calls, as pairs of slack in seconds (a lower bound) and a number of calls.
        start_s: seconds from the wish for an engine until it serves.
        served_per_s: answers per second, if calls have waited for a slot all the time lately.
    """

    arrivals_per_s: float
    waiting: float
    slack: tuple[tuple[float, int], ...] = ()
    start_s: float = 60.0
    served_per_s: float | None = None

    def on_time(self, wait_s: float) -> float:
        """Return the share of calls with time left that is on time after ``wait_s`` more."""
        hopeful = sum(n for slack, n in self.slack if slack >= 0.0)
        if not hopeful:
            return 1.0
        return sum(n for slack, n in self.slack if slack >= max(wait_s, 0.0)) / hopeful


class Scaler:
    """Remembers what hysteresis needs; everything else is in the arguments.

    More engines are wanted at once, one fewer only when that would have done for
    ``down_after_s``, and nothing changes within ``cooldown_s`` of the last change.
    """

    def __init__(self, options: ScalingOptions) -> None:
        self._options = options
        self._changed_s: float | None = None
        self._low_since_s: float | None = None

    def wanted(self, types: Sequence[EngineType], traffic: OfferedLoad, now: float) -> _Counts:
        """Return how many engines of each type there should be.

        Args:
            types: with different names; those without a measured rate count as the mean of others.
            traffic: what they have to do.
            now: seconds, never less than before.
        """
        present = {t.name: _present(t) for t in types}
        rates = _rates(types, traffic.served_per_s)
        if not rates:
            return present
        outlook = _Outlook(self._options, types, rates, traffic, present)
        more = outlook.more()
        fewer = present if more != present else outlook.fewer()
        if fewer == present:
            self._low_since_s = None
        elif self._low_since_s is None:
            self._low_since_s = now
        if self._changed_s is not None and now - self._changed_s < self._options.cooldown_s:
            return present
        if more != present:
            return self._change(more, now)
        low_s = self._low_since_s
        if low_s is not None and now - low_s >= self._options.down_after_s:
            return self._change(fewer, now)
        return present

    def _change(self, counts: _Counts, now: float) -> _Counts:
        self._changed_s, self._low_since_s = now, None
        return counts


def _rates(types: Sequence[EngineType], served_per_s: float | None) -> dict[str, float]:
    known = [t.calls_per_s for t in types if t.calls_per_s]
    if not known:
        return {}
    mean = sum(known, 0.0) / len(known)
    rates = {t.name: t.calls_per_s or mean for t in types}
    if served_per_s is None:
        return rates
    predicted = sum((t.serving * rates[t.name] for t in types), 0.0)
    pace = min(served_per_s / max(predicted, _EPSILON), 1.0)
    return {name: max(pace * rate, _EPSILON) for name, rate in rates.items()}


def _present(of: EngineType) -> int:
    return min(max(of.count, of.least), of.most)


def _most(of: EngineType) -> int:
    return _present(of) if of.placeless else of.most


class _Outlook:
    """Values of possible numbers of engines at one moment."""

    def __init__(
        self,
        options: ScalingOptions,
        types: Sequence[EngineType],
        rates: Mapping[str, float],
        traffic: OfferedLoad,
        present: _Counts,
    ) -> None:
        self._options, self._rates, self._traffic = options, rates, traffic
        self._types, self._present = types, present
        self._least = {t.name: t.least for t in types}
        self._most = {t.name: _most(t) for t in types}
        self._placeless = {t.name: t.placeless for t in types}

    def more(self) -> _Counts:
        """Add engines, the most useful first, until the value is near the best there can be."""
        load, counts = self._options.up_load, dict(self._present)
        enough = self._enough(load)
        while self.value(counts, load) < enough:
            able = [name for name in counts if counts[name] < self._most[name]]
            if not able:
                break
            counts[max(able, key=lambda name: (self._with(counts, name, load), name))] += 1
        return counts

    def fewer(self) -> _Counts:
        """Take away one engine, the slowest that can be spared; all stay if none can be."""
        counts = self._present
        for name in sorted(counts, key=lambda name: (self._rates[name], name)):
            left = {**counts, name: counts[name] - 1}
            if counts[name] > self._least[name] and self._of(left).sufficient():
                return left
        return counts

    def sufficient(self) -> bool:
        """Whether those present would do at the lower load, and no more be called for at once."""
        load, counts = self._options.down_load, self._present
        return self.value(counts, load) >= self._enough(load) and self.more() == counts

    def value(self, counts: _Counts, load: float) -> float:
        """Return the answers per second over the horizon, weighed by whether they are on time.

        Args:
            counts: those present, or more.
            load: share of their capacity to count on.
        """
        traffic, horizon_s = self._traffic, self._options.horizon_s
        capacity = max(self._capacity(counts, load), _EPSILON)
        excess = traffic.arrivals_per_s - self._capacity(self._present, load)
        queue = max(traffic.waiting + excess * traffic.start_s, 0.0)
        left = max(queue + (traffic.arrivals_per_s - capacity) * horizon_s, 0.0)
        served = min(queue / horizon_s + traffic.arrivals_per_s, capacity)
        on_time, late = traffic.on_time(max(queue, left) / capacity), self._options.late_worth
        return served * (late + (1.0 - late) * on_time)

    def _of(self, present: _Counts) -> _Outlook:
        return _Outlook(self._options, self._types, self._rates, self._traffic, present)

    def _enough(self, load: float) -> float:
        return (1.0 - self._options.tolerance) * self.value(self._most, load) - _EPSILON

    def _with(self, counts: _Counts, name: str, load: float) -> tuple[float, float]:
        """Return what one more of ``name`` leads to: value, and the rate that breaks ties."""
        return self.value({**counts, name: counts[name] + 1}, load), self._rates[name]

    def _capacity(self, counts: Mapping[str, int], load: float) -> float:
        running = ((max(n - self._placeless[name], 0), name) for name, n in counts.items())
        return load * sum((n * self._rates[name] for n, name in running), 0.0)
