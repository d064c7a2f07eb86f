"""Step cost of one engine, learned online from its own step timings.

The model is :class:`hexgen_vllm.types.StepCost`: six coefficients, linear in what a step
contains. They are the non-negative, weighted, regularised least squares over what is remembered::

    minimise over u >= 0:   sum w/m^2 (t - sum z_i u_i)^2
                            + sum_i (rho/s^2) (u_i - v_i)^2 + (rho'/s^2) (u_i - s g_i)^2

with t the measured time of a step, m its predicted one (so that errors count relative to the
step), w a Huber weight, z_i what a nominal device would need for part i of the step, u_i how many
times longer this one needs, v_i what that was by the solution before, s the time over the nominal
one in all, and g_i the prior: a device of nominal shape. Both regularisers are tiny: they decide
only what steps leave open, first the prior, later what was known before.

**What is remembered.** Steps are sorted into cells by what they contain: how many sequences decode,
how long they are, how large the prefill is. Each cell keeps decaying sums of products over about
its last 256 steps. New steps push out old ones *of their own cell* only, so a day of equal steps
neither drifts nor unlearns the others: a cell that nothing falls into weighs less and less against
fresh ones, down to a floor, and then decides only what no fresh one says. There are at most
66 cells. Sums of squares with non-negative weights are positive semi-definite by construction,
the ridge makes them definite; nothing is updated by subtraction, so nothing loses its symmetry.

**A device that changes its speed** is seen by a two-sided CUSUM over the errors of predictions, of
steps with and without prefill apart. The evidence asked for is eight steps, or fewer if they are
long. All that is remembered is then scaled by the change and discounted; what lies in cells that
were seen since and did not change stays. Outliers (a garbage collection, a compilation, a clock
that jumped) are not a change, as their neighbours are as predicted; they weigh little.

Cost: two to four microseconds for an observation without prefill, about ten with one; a solve of
100 to 200 microseconds for every 64. Memory is constant.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Final

from hexgen_vllm.types import StepCost

# Coefficients of a nominal device: a mid-range one with a 70B model (published latencies of an
# L40S). Only their proportions matter, and only for what was not measured: everything is scaled to
# what was.
_C0, _C1, _C2, _P0, _P1, _P2 = 0.04, 2e-4, 1e-8, 2e-3, 1 / 2200, 1e-9
_RIDGE: Final = 1e-4  # rho, in squared relative errors
_PRIOR_RIDGE: Final = 1e-6
_N: Final = 6
_SUMS: Final = 27  # products of features, then of features and times
_TIMES_AT: Final[tuple[int, ...]] = (6, 7, 8, 24, 25, 26)
_GROWTH: Final = 256 / 255  # of the weight of a step against the one before it in its cell
_MOST_GROWN: Final = 1e3
_HALF_LIFE: Final = 2048.0  # observations in which a cell that nothing falls into halves
_FLOOR: Final = 0.1
_LONG_CONTEXT: Final = 4096
_LARGE_PREFILL: Final = 512
_LEAST_S: Final = 1e-7
_MOST_S: Final = 3600.0
_MOST_TOKENS: Final = 1e15
_RAW: Final = 32  # observations that are kept as they are until the fit stands
_FIRST: Final = 8  # of them before the first fit
_RECENT: Final = 64  # errors that spread and honest error are taken from
_HUBER: Final = 2.5
_LEAST_SPREAD: Final = 0.03
_MOST_SPREAD: Final = 0.5
_FIRST_SPREAD: Final = 0.3
_SOLVE_EVERY: Final = 64
# CUSUM: errors in spreads, cut at _CUT, less _DRIFT each; an alarm at _ALARM with enough steps.
_CUT: Final = 6.0
_DRIFT: Final = 1.0
_ALARM: Final = 12.0
_STEPS: Final = 8.0
_STEP_S: Final = 4.0  # so long a step counts as one more
_LAST: Final = 8  # steps, of which ...
_AGREE: Final = 0.8  # so many must be off by half of the change or more
_LEAST_CHANGE: Final = 0.16  # of the logarithm of the time
_KEEP: Final = 0.05  # of the weight of what was before the change
_ESTABLISHED: Final = 4.0  # steps that a cell must have to judge others by it
_ALL_STEPS: Final = 256
_LONG_STEP_S: Final = 0.25
_TRUSTED: Final = 0.25  # errors up to which a fit is believed, as steps do vary ...
_DISTRUSTED: Final = 1.0  # ... and from which on it is not: half or twice as long
_LEVELS: Final = 8  # speeds that are remembered
_SAME_LEVEL: Final = 0.08
_REFINE: Final = 64  # steps after a change that it is measured by
_NOMINAL: Final[tuple[float, ...]] = (_C0, _C1, _C2, _P0, _P1, _P2)
_PRIOR: Final[tuple[float, ...]] = (
    1.0,
    1.0,
    1.0,
    0.0,
    1.0,
    0.0,
)  # g: fixed and quadratic cost of prefill are none
UNMEASURED: Final = StepCost(*(c * g for c, g in zip(_NOMINAL, _PRIOR, strict=True)))
"""What a device is taken for as long as none was measured: only relative load matters then."""
# Where the products lie in the sums: those of steps without prefill first.
_AT: Final[tuple[tuple[int, ...], ...]] = (
    (0, 1, 2, 9, 10, 11),
    (1, 3, 4, 12, 13, 14),
    (2, 4, 5, 15, 16, 17),
    (9, 12, 15, 18, 19, 20),
    (10, 13, 16, 19, 21, 22),
    (11, 14, 17, 20, 22, 23),
)


@dataclass(frozen=True, slots=True)
class StepShape:
    """What one engine step contained.

    Attributes:
        n_decode: sequences that decoded.
        ctx_decode: sum of their context tokens.
        n_prefill: prompt tokens computed.
        prefill_ctx: sum over prefill chunks of tokens times mean context.
    """

    n_decode: int
    ctx_decode: int = 0
    n_prefill: int = 0
    prefill_ctx: float = 0.0


def is_sampled(before: int, steps: int, prefill: bool, seconds: float) -> bool:
    """Return whether equal steps are learned from: the first ones, long ones, some of the many.

    All of the first 256 and those of a quarter of a second; else one in two of those with prefill,
    and one in four of the others. It is a matter of cost: a fit is as good by then as it gets, and
    a change shows all the same.

    Args:
        before: steps that the engine did before these.
        steps: how many they are.
        prefill: whether they have prefill.
        seconds: what one of them took.
    """
    every = 2 if prefill else 4
    if before < _ALL_STEPS or seconds >= _LONG_STEP_S:
        return True
    return (before + steps) // every > before // every


def trust(error: float | None) -> float:
    """Return how far a fit is believed, from 1, wholly, to 0, not at all.

    ::

        1                               error <= 0.25
        (1 - error) / (1 - 0.25)        between
        0                               error >= 1

    Args:
        error: how far steps are from their predictions (:meth:`CostFit.error`). ``None``, which
            says nothing against the fit, is no error; what is not a number is the worst.
    """
    if error is None:
        return 1.0
    if not error < _DISTRUSTED:
        return 0.0
    return min((_DISTRUSTED - error) / (_DISTRUSTED - _TRUSTED), 1.0)


def trusted_cost(fit: StepCost, error: float | None, fallback: StepCost) -> StepCost:
    """Return the step cost to reckon with: ``fit`` as far as its error allows, else ``fallback``.

    Each coefficient is ``w * fit + (1 - w) * fallback`` with w from :func:`trust`.

    Args:
        fit: what was measured.
        error: of its predictions.
        fallback: what is known besides: the engine's own cost when it could be trusted, what
            engines of its fleet cost, or a nominal cost.
    """
    w = trust(error)
    if w >= 1.0:
        return fit
    v = 1.0 - w
    return StepCost(
        w * fit.c0 + v * fallback.c0,
        w * fit.c1 + v * fallback.c1,
        w * fit.c2 + v * fallback.c2,
        w * fit.p0 + v * fallback.p0,
        w * fit.p1 + v * fallback.p1,
        w * fit.p2 + v * fallback.p2,
    )


class _Cell:
    """Steps of one kind: weighted sums of products, the newest step weighing ``gain``."""

    __slots__ = ("gain", "mass", "seen", "sums")

    def __init__(self) -> None:
        self.sums = [0.0] * _SUMS
        self.gain = 1.0
        self.mass = 0.0
        self.seen = 0

    def grow(self) -> float:
        """Let the next step weigh more than the last; return how much."""
        self.gain *= _GROWTH
        if self.gain > _MOST_GROWN:
            self.sums = [v / self.gain for v in self.sums]
            self.mass /= self.gain
            self.gain = 1.0
        return self.gain

    def add(self, weight: float, z0: float, z1: float, z2: float, seconds: float, m: float) -> None:
        """Add what a step has without prefill: its parts, its time, the time to judge it by."""
        s, weight = self.sums, weight * self.gain
        self.mass += weight
        weight /= m * m
        w0, w1, w2 = weight * z0, weight * z1, weight * z2
        s[0] += w0 * z0
        s[1] += w0 * z1
        s[2] += w0 * z2
        s[3] += w1 * z1
        s[4] += w1 * z2
        s[5] += w2 * z2
        s[6] += w0 * seconds
        s[7] += w1 * seconds
        s[8] += w2 * seconds

    def add_prefill(
        self, weight: float, parts: tuple[float, ...], seconds: float, m: float
    ) -> None:
        """Add what prefill adds to a step, of which all parts are given."""
        s, at = self.sums, 9
        weight *= self.gain / (m * m)
        z0, z1, z2, z3, z4, z5 = parts
        w3, w4, w5 = weight * z3, weight * z4, weight * z5
        for z in (z0, z1, z2):
            s[at] += w3 * z
            s[at + 1] += w4 * z
            s[at + 2] += w5 * z
            at += 3
        s[18] += w3 * z3
        s[19] += w3 * z4
        s[20] += w3 * z5
        s[21] += w4 * z4
        s[22] += w4 * z5
        s[23] += w5 * z5
        s[24] += w3 * seconds
        s[25] += w4 * seconds
        s[26] += w5 * seconds

    def scale(self, ratio: float, kept: float) -> None:
        """Let all steps have taken ``ratio`` times as long, and weigh ``kept`` times as much."""
        square, times = kept / (ratio * ratio), kept / ratio
        sums = [v * square for v in self.sums]
        for at in _TIMES_AT:
            sums[at] = self.sums[at] * times
        self.sums = sums
        self.mass *= kept


class _Errors:
    """Errors of predictions of steps of one sort, as logarithms of measured over predicted.

    Attributes:
        recent: the last ones.
        spread: their usual size.
        count: how many there were.
    """

    __slots__ = ("_down", "_others", "_up", "count", "recent", "spread")

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=_RECENT)
        self._others: deque[int] = deque(maxlen=_LAST)  # when the last of them came
        self.spread = _FIRST_SPREAD
        self.count = 0
        self._up, self._down = _Cusum(), _Cusum()

    def take(self, off: float, others: int) -> None:
        """Take in an error, which comes when there were ``others`` of the other sort."""
        self.count += 1
        self.recent.append(off)
        self._others.append(others)

    def clear(self) -> None:
        """Forget recent errors."""
        self.recent.clear()
        self._others.clear()

    def measure(self) -> None:
        """Take the spread from recent errors: that of a normal distribution with their quartiles.

        An error that all have is none of it; two modes, each frequent, are.
        """
        n = len(self.recent)
        if n >= _FIRST:
            offs = sorted(self.recent)
            usual = (offs[3 * n // 4] - offs[n // 4]) / 1.349
            self.spread = min(max(usual, _LEAST_SPREAD), _MOST_SPREAD)

    def changed(self, off: float, seconds: float) -> tuple[float, int, int] | None:
        """Judge an error; return the change of speed it completes the evidence for.

        Args:
            off: the error, in :attr:`recent` already.
            seconds: what the step took.

        Returns:
            The change as a logarithm, the errors it stands on, and how many errors of the other
            sort there were when the first came that shows it.
        """
        z = off / self.spread
        for side, size in ((self._up, z), (self._down, -z)):
            if not side.add(min(size, _CUT), seconds):
                continue
            last = list(self.recent)[-min(side.steps, _LAST) :]
            shift = median(last)
            agree = [off / shift > 0.5 for off in last] if shift else []
            far = abs(shift) >= max(2 * self.spread, _LEAST_CHANGE)
            if far and sum(agree) >= _AGREE * len(last):
                return shift, len(last), self._others[agree.index(True) - len(last)]
        return None

    def moved(self, shift: float, steps: int) -> None:
        """Keep the last ``steps`` errors, as they are after a change by ``shift``."""
        kept = list(self.recent)[len(self.recent) - steps :]
        self.recent.clear()
        self.recent.extend(off - shift for off in kept)
        self._up.reset()
        self._down.reset()

    def typical(self) -> float | None:
        """Return the median size of recent errors."""
        return median([abs(off) for off in self.recent]) if self.recent else None


class _Cusum:
    """One side of a CUSUM test: how much was too much, and for how long."""

    __slots__ = ("seconds", "steps", "total")

    def __init__(self) -> None:
        self.total = self.seconds = 0.0
        self.steps = 0

    def reset(self) -> None:
        """Begin anew."""
        self.total = self.seconds = 0.0
        self.steps = 0

    def add(self, size: float, seconds: float) -> bool:
        """Take in a step; return whether there is evidence enough."""
        if not self.steps and size <= _DRIFT:
            return False
        self.total = min(self.total + size - _DRIFT, 2 * _ALARM)
        if self.total <= 0.0:
            self.reset()
            return False
        self.steps += 1
        self.seconds += seconds
        enough = self.steps + self.seconds / _STEP_S >= _STEPS and self.steps > 1
        return enough and self.total >= _ALARM


class CostFit:
    """Online fit of a :class:`StepCost`.

    Args:
        min_steps: observations before the fit is known.
        min_prefills: of which with prefill; until then prefill cost is unknown.

    Attributes:
        steps: observations taken in.
        prefills: of them with prefill.
    """

    def __init__(self, *, min_steps: int = 20, min_prefills: int = 3) -> None:
        self._min_steps, self._min_prefills = min_steps, min_prefills
        self._u = list(_PRIOR)
        self._cells: dict[int, _Cell] = {}
        self._plain, self._mixed = _Errors(), _Errors()  # without and with prefill
        self._raw: list[tuple[float, float, float, float, float, float]] | None = []
        self._due = _FIRST  # when the next solve is
        # Logarithms of speeds there were, the present one last. A device that goes to and fro
        # returns to them exactly, so that what is not seen meanwhile does not wander off.
        self._levels = [0.0]
        # Since a change: the coefficients right after it, its step, and errors against them.
        self._after: tuple[list[float], int, list[float]] | None = None
        self._cost: StepCost | None = None  # of the present coefficients, once asked for
        self._error: float | None = None
        self._error_due = 1
        self.steps = 0
        self.prefills = 0

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Learn that a step of ``shape`` took ``seconds``; impossible values are ignored."""
        self.observe_step(
            shape.n_decode, shape.ctx_decode, shape.n_prefill, shape.prefill_ctx, seconds
        )

    def observe_step(
        self,
        n_decode: float,
        ctx_decode: float,
        n_prefill: float,
        prefill_ctx: float,
        seconds: float,
    ) -> None:
        """Learn as :meth:`observe` does, of a mean over steps, too."""
        self._take(n_decode, ctx_decode, 1.0 if n_prefill else 0.0, n_prefill, prefill_ctx, seconds)

    def observe_call(
        self, output_tokens: int, n_decode: float, context: float, uncached: int, seconds: float
    ) -> None:
        """Learn from a whole call, where the steps themselves cannot be seen.

        A call is ``output_tokens`` decode steps plus its prefill; dividing by the number of steps
        gives one average step, in which the model is linear too.

        Args:
            output_tokens: tokens it produced.
            n_decode: mean number of sequences it shared the batch with, itself included.
            context: its mean context tokens.
            uncached: prompt tokens that had to be prefilled.
            seconds: from its start (not its queueing) to its end.
        """
        n = output_tokens
        if n > 0:
            area = uncached * uncached / 2 / n
            self._take(n_decode, n_decode * context, 1 / n, uncached / n, area, seconds / n)

    def known(self) -> bool:
        """Whether there is evidence for both decode and prefill."""
        return self.steps >= max(self._min_steps, _FIRST) and self.prefills >= self._min_prefills

    def cost(self) -> StepCost | None:
        """Return the fit, no coefficient of which is negative, or ``None`` while unknown."""
        if self._cost is None and self.known():
            self._cost = StepCost(*[u * c for u, c in zip(self._u, _NOMINAL, strict=True)])
        return self._cost

    def error(self) -> float | None:
        """Return how far recent steps were from their predictions, ``None`` if there were none.

        Each was predicted before it was learned from. 0.1 is 10 %, 1.0 is twice as long or half
        as long. Steps with prefill and without it count apart, the worse of the two is returned.
        """
        if self.steps >= self._error_due:
            found = [e for e in (self._plain.typical(), self._mixed.typical()) if e is not None]
            self._error = math.expm1(max(found)) if found else None
            self._error_due = self.steps + _FIRST
        return self._error

    def _take(
        self, n: float, ctx: float, first: float, prefill: float, area: float, seconds: float
    ) -> None:
        """Learn from a step or from the mean of several.

        Args:
            n, ctx, prefill, area: as in :class:`StepShape`.
            first: share of the steps that had prefill.
            seconds: of a step.
        """
        # Written so that what is not a number fails, too.
        if not (_LEAST_S <= seconds <= _MOST_S and 0.0 < n + prefill <= _MOST_TOKENS):
            return
        if not (n >= 0 and prefill >= 0 and 0.0 <= ctx <= _MOST_TOKENS and 0 <= area < math.inf):
            return
        self.steps += 1
        self.prefills += first > 0
        raw = self._raw
        if raw is None:
            self._learn(n, ctx, first, prefill, area, seconds)
            if self.steps >= self._due:
                self._solve()
                self._due = self.steps + _SOLVE_EVERY
            return
        raw.append((n, ctx, first, prefill, area, seconds))
        if self.steps >= self._due:
            self._learn_anew(raw)
            self._due = self.steps + _FIRST
            if self.steps >= _RAW:
                self._raw = None

    def _learn_anew(self, raw: list[tuple[float, float, float, float, float, float]]) -> None:
        """Fit to the first observations: to all, then to those that fit, until that stands."""
        ratios = []
        for n, ctx, _, prefill, _, seconds in raw:
            ratios.append(seconds / (_C0 + _C1 * n + _C2 * ctx + _P1 * prefill))
        scale = median(ratios)
        self._u = [scale * g for g in _PRIOR]
        self._plain.spread = self._mixed.spread = _MOST_SPREAD
        for _ in range(4):
            self._cells.clear()
            self._plain.clear()
            self._mixed.clear()
            for n, ctx, first, prefill, area, seconds in raw:
                self._learn(n, ctx, first, prefill, area, seconds, judge=False)
            self._solve()

    def _learn(
        self,
        n: float,
        ctx: float,
        first: float,
        prefill: float,
        area: float,
        seconds: float,
        *,
        judge: bool = True,
    ) -> None:
        u = self._u
        z0, z1, z2 = _C0, _C1 * n, _C2 * ctx
        likely_s = u[0] * z0 + u[1] * z1 + u[2] * z2
        key = min(int(n).bit_length(), 10) * 6 + 3 * (ctx >= _LONG_CONTEXT * n)
        errors, other = self._plain, self._mixed
        z3 = z4 = z5 = 0.0
        if first:
            z3, z4, z5 = _P0 * first, _P1 * prefill, _P2 * area
            likely_s += u[3] * z3 + u[4] * z4 + u[5] * z5
            key += 2 if prefill >= _LARGE_PREFILL else 1
            errors, other = other, errors
        likely_s = max(likely_s, _LEAST_S)
        off = math.log(seconds / likely_s)
        errors.take(off, other.count)
        size, limit = abs(off), _HUBER * errors.spread
        weight = 1.0 if size <= limit else limit / size

        cell = self._cells.get(key)
        if cell is None:
            cell = self._cells[key] = _Cell()
        cell.seen = self.steps
        gain = cell.grow()
        if judge and cell.mass >= _ESTABLISHED * gain:
            change = errors.changed(off, seconds)
            if change is not None:
                self._rescale(errors, *change)
                return
            if self._after is not None:
                self._refine((z0, z1, z2, z3, z4, z5), seconds)
        # A step that took far longer than predicted is taken relative to what it took.
        m = max(likely_s, seconds / 8)
        cell.add(weight, z0, z1, z2, seconds, m)
        if first:
            cell.add_prefill(weight, (z0, z1, z2, z3, z4, z5), seconds, m)

    def _rescale(self, errors: _Errors, shift: float, steps: int, began: int) -> None:
        """Scale what is remembered by a change of speed.

        That are the steps of the sort in which it was seen, and those of the other sort unless
        they were seen since and did not change: a device that slows down slows all it does.
        """
        other = self._mixed if errors is self._plain else self._plain
        since = min(other.count - began, len(other.recent))
        both = since < 3 or median(list(other.recent)[-since:]) / shift > 0.5
        known = False
        if both:
            shift, known = self._level(shift)
        for key, cell in self._cells.items():
            if both or (key % 3 > 0) == (errors is self._mixed):
                kept = max(_KEEP, min(_ESTABLISHED * cell.gain / max(cell.mass, 1e-9), 1.0))
                cell.scale(math.exp(shift), kept)
        errors.moved(shift, steps)
        if both:
            other.moved(shift, max(since, 0))
        self._solve()
        self._after = (self._u, self.steps, []) if both and not known else None
        self._due = self.steps + _FIRST

    def _refine(self, parts: tuple[float, ...], seconds: float) -> None:
        """Measure a change of speed better, for what is not seen meanwhile."""
        if self._after is None:
            return
        then, changed_at, offs = self._after
        likely_s = sum([u * z for u, z in zip(then, parts, strict=True)], 0.0)
        offs.append(math.log(seconds / max(likely_s, _LEAST_S)))
        if len(offs) < _REFINE:
            return
        shift = median(offs)
        self._after = None
        if abs(shift) < _SAME_LEVEL:
            self._levels[-1] += shift
            for cell in self._cells.values():
                if cell.seen < changed_at:
                    cell.scale(math.exp(shift), 1.0)

    def _level(self, shift: float) -> tuple[float, bool]:
        """Return a change of speed, exactly to one that was there if it is about that.

        Also whether it is.
        """
        levels = self._levels
        level = levels[-1] + shift
        nearest = min(levels, key=lambda one: abs(one - level))
        known = abs(nearest - level) < _SAME_LEVEL
        if known:
            shift, level = nearest - levels[-1], nearest
            levels.remove(nearest)
        levels.append(level)
        del levels[:-_LEVELS]
        return shift, known

    def _solve(self) -> None:
        """Set the coefficients from what is remembered."""
        self._plain.measure()
        self._mixed.measure()
        sums = [0.0] * _SUMS
        for cell in self._cells.values():
            age = self.steps - cell.seen
            weight = max(0.5 ** (age / _HALF_LIFE), _FLOOR) / cell.gain
            sums = [a + weight * b for a, b in zip(sums, cell.sums, strict=True)]
        whole = sum([sums[at] for row in _AT for at in row], 0.0)
        if not whole > 0.0:
            return
        scale = sum([sums[at] for at in _TIMES_AT], 0.0) / whole
        ridge, prior = _RIDGE / (scale * scale), _PRIOR_RIDGE / (scale * scale)
        matrix = [[sums[at] for at in row] for row in _AT]
        right = []
        for i, at in enumerate(_TIMES_AT):
            matrix[i][i] += ridge + prior
            right.append(sums[at] + ridge * self._u[i] + prior * scale * _PRIOR[i])
        self._u = _non_negative(matrix, right)
        self._cost = None
        self._error_due = self.steps


def _non_negative(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Return about the u >= 0 that minimises u'Au/2 - b'u: the worst below 0 is set to 0, again.

    Args:
        matrix: A, positive definite.
        right: b.
    """
    free = list(range(_N))
    while True:
        found = _solved([[matrix[i][j] for j in free] for i in free], [right[i] for i in free])
        least = min(range(len(found)), key=found.__getitem__)
        if found[least] >= 0.0 or len(free) == 1:
            break
        del free[least]
    u = [0.0] * _N
    for i, value in zip(free, found, strict=True):
        u[i] = max(value, 0.0)
    return u


def _solved(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Return the solution of A x = b by Cholesky's decomposition, A being positive definite."""
    n = len(right)
    lower = [[0.0] * n for _ in range(n)]
    y = [0.0] * n
    for i in range(n):
        row = lower[i]
        for j in range(i):
            other = lower[j]
            total = matrix[i][j]
            for k in range(j):
                total -= row[k] * other[k]
            row[j] = total / other[j]
        pivot, value = matrix[i][i], right[i]
        for k in range(i):
            pivot -= row[k] * row[k]
            value -= row[k] * y[k]
        row[i] = math.sqrt(max(pivot, 1e-12 * matrix[i][i]))
        y[i] = value / row[i]
    for i in range(n - 1, -1, -1):
        value = y[i]
        for k in range(i + 1, n):
            value -= lower[k][i] * y[k]
        y[i] = value / lower[i][i]
    return y
