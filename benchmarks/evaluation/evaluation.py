"""From runs to figures that a rival's author would sign. Values only.

A cell is one scenario at one load with one seed: the same workflows, arriving at the same moments,
under every policy. In each cell we stand against the best rival of that cell, by that figure.

- A rival counts with its published knobs and with knobs tuned on other scenarios and seeds, as
  ours are; the paper's policy counts with its best alpha of the cell itself.
- A policy whose queue grows (:func:`queue_grows`) has no latency to speak of: as a rival it is out,
  and when ours grows while a rival's does not, the cell is lost.
- Above capacity rivals get a cap on open workflows, the best of a grid on other seeds.

The best of a dozen rivals of a cell is in part the luckiest, the more so the fewer workflows the
figure rests on, and nobody knows it in advance. So two more figures stand beside: against the
rival that was best in the other half of the same run (:meth:`Results.apart`), and against the one
rival that is best when all cells are taken together. Which cells are lost, and won, beyond noise
says :func:`surely`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from random import Random
from statistics import fmean
from typing import Any, Final, NamedTuple

from hexgen_vllm.report.summary import percentile

Row = Mapping[str, Any]

OURS: Final = "slack"
PROTECT: Final = "slack protect"
ORACLE: Final = "oracle"
TRUE_RATES: Final = "slack, true rates"
NO_RIVALS: Final = (OURS, PROTECT, ORACLE, TRUE_RATES)
LOST: Final = 0.99
"""A cell is lost when the best rival needs less than this share of our deadline."""
FULL: Final = 1.0
_LEAST_SHARE: Final = 0.5  # cells where the best rival has fewer on time say nothing of shares
_GROWTH: Final = 0.05  # of arrivals that stay, from which on a queue grows
_BLOCK: Final = 20  # workflows in a row that are drawn together: neighbours share their queues
_DRAWS: Final = 400
_TAIL: Final = 0.025


class Cell(NamedTuple):
    """What all policies of a comparison have in common."""

    scenario: str
    load: float
    seed: int

    def __str__(self) -> str:
        return f"{self.scenario} at {self.load:g}, seed {self.seed}"


class Figure(NamedTuple):
    """One figure of a run, and how two of them compare.

    Attributes:
        key: in a row.
        text: for people.
        goal: of the mean ratio, at least.
        share: of the workflows, that are faster.
    """

    key: str
    text: str
    goal: float
    share: float


FIGURES: Final = {
    "best_rival_md95": Figure("min_deadline_95_s", "deadline that 95 % meet", 1.10, 0.95),
    "best_rival_md99": Figure("min_deadline_99_s", "deadline that 99 % meet", 1.12, 0.99),
    "p50_vs_best_rival": Figure("p50_s", "P50", 0.99, 0.5),
}


class Margin(NamedTuple):
    """Ours against rivals over many cells: how many times as good, by one figure.

    Attributes:
        mean: geometric mean of the ratios, more is better for us.
        worst: the least of them, and where.
        at: the cell of ``worst``.
        lost: cells in which the ratio is under :data:`LOST`.
        cells: all of them.
    """

    mean: float
    worst: float
    at: Cell
    lost: int
    cells: int


class Results:
    """All runs of an evaluation."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._runs: dict[Cell, dict[str, Row]] = {}
        for row in rows:
            cell = Cell(row["scenario"], row["load"], row["seed"])
            self._runs.setdefault(cell, {})[row["policy"]] = row

    @property
    def cells(self) -> list[Cell]:
        """All cells, in order of first appearance."""
        return list(self._runs)

    @property
    def policies(self) -> list[str]:
        """All policies, in order of first appearance."""
        return list(dict.fromkeys(name for runs in self._runs.values() for name in runs))

    @property
    def rivals(self) -> list[str]:
        """The policies that we stand against."""
        return [name for name in self.policies if name not in NO_RIVALS]

    def run(self, cell: Cell, policy: str) -> Row | None:
        """Return a run, ``None`` if it was not played."""
        return self._runs[cell].get(policy)

    def below_capacity(self) -> list[Cell]:
        """Return the cells with less than the fleet's capacity."""
        return [cell for cell in self._runs if cell.load <= FULL]

    def overloaded(self) -> list[Cell]:
        """Return the cells with more than the fleet's capacity."""
        return [cell for cell in self._runs if cell.load > FULL]

    def value(self, cell: Cell, policy: str, key: str) -> float | None:
        """Return a figure; ``None`` where there is none or the policy's queue grows."""
        run = self._runs[cell].get(policy)
        return None if run is None or run["grows"] else run[key]

    def margin(self, figure: Figure, rivals: Sequence[str] | None = None) -> Margin | None:
        """Return how ours compares with the best of ``rivals`` in each cell below capacity.

        ``None`` when there is no cell in which both have the figure. A cell that only a rival
        sustains counts with ratio 0.5 and as lost.
        """
        ratios = {}
        for cell in self.below_capacity():
            ratio = self.ratio(cell, figure, self.rivals if rivals is None else rivals)
            if ratio is not None:
                ratios[cell] = ratio
        return margin_of(ratios)

    def ratio(self, cell: Cell, figure: Figure, rivals: Sequence[str]) -> float | None:
        """Return how many times as good ours is as the best rival of a cell."""
        if OURS not in self._runs[cell]:
            return None
        found = (self.value(cell, name, figure.key) for name in rivals)
        best = min((v for v in found if v), default=None)
        ours = self.value(cell, OURS, figure.key)
        if best is None:
            return None
        return best / ours if ours else 0.5

    def apart(self, figure: Figure) -> float | None:
        """Return the geometric mean against the rival that was best in the other half of a run.

        Each half of the workflows of a cell, in order of arrival, is compared with the rival that
        has the best figure in the other half. Cells in which ours has no figure are not counted.
        """
        logs = []
        for cell in self.below_capacity():
            found = self._latencies(cell)
            ours = found.pop(OURS, None)
            if ours is None or not found:
                continue
            half = len(ours) // 2
            parts = slice(half), slice(half, None)
            for chosen, compared in (parts, parts[::-1]):
                at = {name: percentile(v[chosen], figure.share) for name, v in found.items()}
                best = found[min(at, key=lambda name: at[name])]
                ratio = percentile(best[compared], figure.share)
                logs.append(math.log(ratio / percentile(ours[compared], figure.share)))
        return math.exp(fmean(logs)) if logs else None

    def against_one(self, figure: Figure) -> float | None:
        """Return the mean against the rival that is best in all cells taken together."""
        margins = (self.margin(figure, [name]) for name in self.rivals)
        return min((margin.mean for margin in margins if margin is not None), default=None)

    def beyond_noise(self, figure: Figure) -> tuple[int, int]:
        """Return how many cells are lost and won beyond noise against the best rival of each."""
        lost = won = 0
        for cell in self.below_capacity():
            found = self._latencies(cell)
            ours = found.pop(OURS, None)
            if ours is not None and found:
                at = {name: percentile(v, figure.share) for name, v in found.items()}
                sign = surely(found[min(at, key=lambda n: at[n])], ours, figure.share)
                lost, won = lost + (sign < 0), won + (sign > 0)
        return lost, won

    def _latencies(self, cell: Cell) -> dict[str, Sequence[float]]:
        """Return the latencies of ours and of rivals whose queues do not grow."""
        return {
            name: run["latencies_s"]
            for name, run in self._runs[cell].items()
            if (name == OURS or name in self.rivals)
            and not run["grows"]
            and len(run["latencies_s"]) > 1
            and None not in run["latencies_s"]
        }

    def growing(self) -> list[tuple[str, str]]:
        """Return which policies' queues grew in which cells below capacity."""
        return [
            (name, str(cell))
            for cell in self.below_capacity()
            for name, run in self._runs[cell].items()
            if run["grows"]
        ]

    def shares(
        self, key: str, cells: Iterable[Cell], rivals: Sequence[str] | None = None
    ) -> dict[Cell, tuple[float, float]]:
        """Return a share of ours and of the best of ``rivals``, in percent points, by cell."""
        found, rivals = {}, self.rivals if rivals is None else rivals
        for cell in cells:
            runs = self._runs[cell]
            theirs = [r[key] for name, r in runs.items() if name in rivals]
            mine = runs.get(OURS if cell.load <= FULL else PROTECT)
            if mine is None or not theirs or mine[key] is None or None in theirs:
                continue
            found[cell] = 100.0 * mine[key], 100.0 * max(theirs)
        return found


def margin_of(ratios: Mapping[Cell, float]) -> Margin | None:
    """Return what ``ratios`` amount to, ``None`` when there is none."""
    if not ratios:
        return None
    mean = math.exp(fmean(math.log(value) for value in ratios.values()))
    at = min(ratios, key=lambda cell: ratios[cell])
    lost = sum(value < LOST for value in ratios.values())
    return Margin(mean, ratios[at], at, lost, len(ratios))


def surely(theirs: Sequence[float], ours: Sequence[float], share: float) -> int:
    """Return -1 or 1 where ours is surely slower or faster at ``share``, 0 where neither is sure.

    Workflows are drawn again with repetition, the same ones of both, in blocks of neighbours
    (circular block bootstrap, Politis and Romano 1992): sure is what 97.5 % of the draws say.
    """
    rng, count = Random(0), len(ours)
    slower = faster = 0
    for _ in range(_DRAWS):
        starts = [rng.randrange(count) for _ in range(-(-count // _BLOCK))]
        drawn = [(start + i) % count for start in starts for i in range(_BLOCK)]
        their = percentile([theirs[i] for i in drawn], share)
        own = percentile([ours[i] for i in drawn], share)
        slower, faster = slower + (own > their), faster + (own < their)
    sure = (1.0 - _TAIL) * _DRAWS
    return (faster >= sure) - (slower >= sure)


def queue_grows(spans: Sequence[tuple[float, float | None]]) -> bool:
    """Return whether workflows pile up, however long the run.

    In the second half of the arrivals, more than 5 % of those that come stay: the number open at
    an arrival rises by more than that per arrival, by least squares, and by more than chance
    would have it: a queue in balance wanders by the root of its arrivals.

    Args:
        spans: arrival and end of each workflow, seconds; ``None`` for one that did not finish.
    """
    arrivals = sorted(start for start, _ in spans)
    ends = sorted(math.inf if end is None else end for _, end in spans)
    done, counts = 0, []
    for opened, at in enumerate(arrivals, 1):
        while done < len(ends) and ends[done] <= at:
            done += 1
        counts.append(opened - done)
    half = counts[len(counts) // 2 :]
    n = len(half)
    if n < 8:
        return False
    middle, mean = (n - 1) / 2, fmean(half)
    slope = sum((i - middle) * (c - mean) for i, c in enumerate(half)) / (n * (n * n - 1) / 12)
    return slope > _GROWTH and slope * n > 2.0 * math.sqrt(n)


def summary(results: Results, live: float | None = None) -> dict[str, Any]:
    """Return ``summary``, one number a goal, and ``worst``, the worst cell of each.

    Names that end in ``_chosen_apart`` and ``_one_rival`` are the same figure against other
    choices of the rival (see the module).
    """
    figures: dict[str, float | None] = {}
    worst: dict[str, Any] = {}
    for key, figure in FIGURES.items():
        margin = results.margin(figure)
        figures[key] = None if margin is None else margin.mean
        worst[key] = None if margin is None else {"value": margin.worst, "cell": str(margin.at)}
        figures[f"{key}_chosen_apart"] = results.apart(figure)
        figures[f"{key}_one_rival"] = results.against_one(figure)
        if key == "best_rival_md95" and margin is not None:
            figures["cells_lost_pct"] = 100.0 * margin.lost / margin.cells
            for name, count in zip(("lost", "won"), results.beyond_noise(figure), strict=True):
                figures[f"cells_{name}_beyond_noise_pct"] = 100.0 * count / margin.cells
    for key, wanted, cells in (
        ("longest_tenth_vs_best_rival", "longest_tenth", results.below_capacity()),
        ("overload_vs_best_capped", "share_on_time", results.overloaded()),
    ):
        shares = results.shares(wanted, cells)
        figures[key], worst[key] = _compared(shares)
        each = (_compared(results.shares(wanted, cells, [name]))[0] for name in results.rivals)
        figures[f"{key}_one_rival"] = min((v for v in each if v is not None), default=None)
    figures["fitted_over_true_md95"], worst["fitted_over_true_md95"] = _fitted(results)
    figures["live_vs_worst_margin"] = live
    return {"summary": figures, "worst": worst}


def _compared(shares: Mapping[Cell, tuple[float, float]]) -> tuple[float | None, Any]:
    """Return ours over the best rival's share, of means, and the cell with the largest gap."""
    if not shares:
        return None, None
    ours, theirs = (fmean(pair[i] for pair in shares.values()) for i in (0, 1))
    at = min(shares, key=lambda cell: shares[cell][0] - shares[cell][1])
    gap = shares[at][0] - shares[at][1]
    return (ours / theirs if theirs else None), {"points": gap, "cell": str(at)}


def _fitted(results: Results) -> tuple[float | None, Any]:
    ratios = {}
    for cell in results.below_capacity():
        fitted = results.value(cell, OURS, "min_deadline_95_s")
        true = results.value(cell, TRUE_RATES, "min_deadline_95_s")
        if fitted and true:
            ratios[cell] = fitted / true
    if not ratios:
        return None, None
    at = max(ratios, key=lambda cell: ratios[cell])
    mean = math.exp(fmean(math.log(value) for value in ratios.values()))
    return mean, {"value": ratios[at], "cell": str(at)}


def behind(results: Results) -> list[tuple[Cell, float, float]]:
    """Return the cells in which ours has fewer on time than the best rival by over a point.

    Only cells in which the best rival has at least half on time; the largest gap first.
    """
    shares = results.shares("share_on_time", results.below_capacity())
    found = [
        (cell, ours, best)
        for cell, (ours, best) in shares.items()
        if best >= 100.0 * _LEAST_SHARE and ours < best - 1.0
    ]
    return sorted(found, key=lambda one: one[1] - one[2])


def tenths(sizes: Sequence[float], on_time: Sequence[bool]) -> list[float]:
    """Return the share on time by tenth of workflow size, the smallest tenth first."""
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i], i))
    shares = []
    for tenth in range(10):
        members = order[len(order) * tenth // 10 : len(order) * (tenth + 1) // 10]
        shares.append(fmean(on_time[i] for i in members) if members else math.nan)
    return shares
