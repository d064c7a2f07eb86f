"""As much of PromQL as our rules and panels use, over samples of real expositions.

``rate`` and ``increase`` are taken between the first and the last sample of the window, without
Prometheus' extrapolation to its edges; resets of counters are seen. As there, a series with fewer
than two samples in the window has neither.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?(?![\w.]))|(?P<name>[a-zA-Z_:][\w:]*)"
    r'|(?P<text>"[^"]*")|(?P<op>==|!=|>=|<=|=~|!~|[-+*/<>=(){}\[\],])|(?P<span>\d+[smhd]))'
)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_STALE_S = 300.0
_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}
_COMPUTE: Mapping[str, Callable[[float, float], float]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b if b else math.nan if a == 0 or math.isnan(a) else math.inf,
}


@dataclass
class Store:
    """Samples by metric and labels, in order of time, of the metrics called ``names``."""

    names: frozenset[str]
    last_s: list[float] = field(default_factory=list)
    series: dict[tuple[str, Labels], list[tuple[float, float]]] = field(default_factory=dict)

    def scrape(self, text: str, at_s: float, **labels: str) -> None:
        """Take in an exposition, with the labels of its target."""
        self._at(at_s)
        lines = [line for line in text.splitlines() if re.split(r"[{ ]", line)[0] in self.names]
        for family in text_string_to_metric_families("\n".join(lines)):
            for sample in family.samples:
                key = sample.name, frozenset({**sample.labels, **labels}.items())
                self.series.setdefault(key, []).append((at_s, sample.value))

    def up(self, at_s: float, value: float, **labels: str) -> None:
        """Note whether a target answered."""
        self._at(at_s)
        key = "up", frozenset(labels.items())
        self.series.setdefault(key, []).append((at_s, value))

    def _at(self, at_s: float) -> None:
        if not self.last_s or self.last_s[-1] != at_s:
            self.last_s.append(at_s)

    def ask(self, query: str, now: float) -> Vector:
        """Return what an expression is at a time."""
        found = _Parser(self, query, now).whole()
        return found if isinstance(found, dict) else {frozenset(): found}


class _Parser:
    def __init__(self, store: Store, query: str, now: float) -> None:
        self._store, self._now = store, now
        self._tokens: list[str] = []
        at = 0
        while query[at:].strip():
            match = _TOKEN.match(query, at)
            assert match is not None, query[at:]
            self._tokens.append(match[0].strip())
            at = match.end()
        self._tokens.append("")

    def whole(self) -> Any:
        value = self._any()
        assert self._tokens == [""], self._tokens
        return value

    def _take(self, *wanted: str) -> str:
        if wanted and self._tokens[0] not in wanted:
            return ""
        return self._tokens.pop(0)

    def _need(self, *wanted: str) -> str:
        token = self._take(*wanted)
        assert token, (wanted, self._tokens)
        return token

    # From what binds least to what binds most

    def _any(self) -> Any:
        value = self._all()
        while self._take("or"):
            other = self._all()
            value = {**other, **value}
        return value

    def _all(self) -> Any:
        value = self._compared()
        while op := self._take("and", "unless"):
            other = self._compared()
            value = {k: v for k, v in value.items() if (k in other) == (op == "and")}
        return value

    def _compared(self) -> Any:
        value = self._sum()
        while op := self._take(*_COMPARE):
            true, other = _COMPARE[op], self._sum()
            pairs = _paired(value, other)
            value = {k: a for k, (a, b) in pairs.items() if true(a, b)}
        return value

    def _sum(self) -> Any:
        return self._computed(("+", "-"), self._product)

    def _product(self) -> Any:
        return self._computed(("*", "/"), self._one)

    def _computed(self, ops: tuple[str, ...], part: Callable[[], Any]) -> Any:
        value = part()
        while op := self._take(*ops):
            other, result = part(), _COMPUTE[op]
            if isinstance(value, float) and isinstance(other, float):
                value = result(value, other)
            else:
                value = {k: result(a, b) for k, (a, b) in _paired(value, other).items()}
        return value

    def _one(self) -> Any:
        token = self._take()
        if token == "(":
            value = self._any()
            self._need(")")
            return value
        if token[0].isdigit():
            return float(token)
        if token in ("sum", "max", "min", "count"):
            return self._aggregated(token)
        if token in ("rate", "increase"):
            return self._grown(token == "rate")
        if token in ("absent", "histogram_quantile"):
            return self._function(token)
        return self._latest(token)

    def _aggregated(self, how: str) -> Vector:
        by: list[str] = []
        if self._take("by"):
            by = self._names()
        self._need("(")
        value = self._any()
        self._need(")")
        groups: dict[Labels, list[float]] = {}
        for labels, number in value.items():
            kept = frozenset(pair for pair in labels if pair[0] in by)
            groups.setdefault(kept, []).append(number)
        does: Any = {"sum": sum, "max": max, "min": min, "count": len}[how]
        return {labels: float(does(numbers)) for labels, numbers in groups.items()}

    def _names(self) -> list[str]:
        self._need("(")
        names = []
        while not self._take(")"):
            names.append(self._take())
            self._take(",")
        return names

    def _function(self, name: str) -> Vector:
        self._need("(")
        if name == "absent":
            value = self._any()
            self._need(")")
            return {} if value else {frozenset(): 1.0}
        self._one()
        self._need(",")
        value = self._any()
        self._need(")")
        return {frozenset(p for p in labels if p[0] != "le"): 0.0 for labels in value}

    def _grown(self, per_second: bool) -> Vector:
        self._need("(")
        chosen = self._selected(self._take())
        self._need("[")
        span = self._take()
        self._need("]")
        self._need(")")
        length = float(span[:-1]) * _SECONDS[span[-1]]
        found: Vector = {}
        for labels, samples in chosen:
            inside = [s for s in samples if self._now - length <= s[0] <= self._now]
            if len(inside) > 1:
                pairs = pairwise(inside)
                grown = sum(b - a if b >= a else b for (_, a), (_, b) in pairs)
                found[labels] = grown / length if per_second else grown
        return found

    def _latest(self, name: str) -> Vector:
        found: Vector = {}
        for labels, samples in self._selected(name):
            recent = [v for at, v in samples if self._now - _STALE_S < at <= self._now]
            last = [at for at, _ in samples if at <= self._now]
            if recent and last[-1] == self._last_scrape():
                found[labels] = recent[-1]
        return found

    def _last_scrape(self) -> float:
        """Return the time of the last scrape: what it did not show is gone."""
        return max(at for at in self._store.last_s if at <= self._now)

    def _selected(self, name: str) -> list[tuple[Labels, list[tuple[float, float]]]]:
        tests: list[Callable[[Mapping[str, str]], bool]] = []
        if self._take("{"):
            while not self._take("}"):
                label, op, text = self._take(), self._take(), self._take()[1:-1]
                tests.append(_matcher(label, op, text))
                self._take(",")
        return [
            (labels, samples)
            for (metric, labels), samples in self._store.series.items()
            if metric == name and all(test(dict(labels)) for test in tests)
        ]


def _matcher(label: str, op: str, text: str) -> Callable[[Mapping[str, str]], bool]:
    def test(labels: Mapping[str, str]) -> bool:
        value = labels.get(label, "")
        hit = value == text if op in ("=", "!=") else re.fullmatch(text, value) is not None
        return hit == (op in ("=", "=~"))

    return test


def _paired(one: Any, other: Any) -> dict[Labels, tuple[float, float]]:
    if isinstance(one, float):
        return {labels: (one, value) for labels, value in other.items()}
    if isinstance(other, float):
        return {labels: (value, other) for labels, value in one.items()}
    return {labels: (value, other[labels]) for labels, value in one.items() if labels in other}


def fires(store: Store, rule: Mapping[str, Any], times: Iterable[float]) -> bool:
    """Whether an alert is firing at the last of ``times``."""
    held = re.fullmatch(r"(\d+)([smhd])", rule.get("for", "0s"))
    assert held is not None
    for_s = float(held[1]) * _SECONDS[held[2]]
    since: dict[Labels, float] = {}
    now = 0.0
    for now in times:
        true = store.ask(rule["expr"], now)
        since = {labels: since.get(labels, now) for labels in true}
    return any(now - at >= for_s for at in since.values())
