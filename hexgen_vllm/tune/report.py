"""A tuning as a table, a plot, and a configuration file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import yaml

from hexgen_vllm.report.plot import COLOURS, require_matplotlib
from hexgen_vllm.report.summary import spread
from hexgen_vllm.report.table import aligned
from hexgen_vllm.sim.policies import ORDERS, Policy
from hexgen_vllm.tune.knobs import Knob, changed, defaults
from hexgen_vllm.tune.online import PRESENT, TUNED
from hexgen_vllm.tune.search import Search, Trial
from hexgen_vllm.tune.verdict import Verdict
from hexgen_vllm.types import EngineKind

_SHOWN: Final = 12
_COLUMNS: Final = 4


def table(search: Search, knobs: Sequence[Knob], heading: str, *, by_value: bool) -> str:
    """Return the candidates, best first or in order of the knob; ``*`` marks the best."""
    best = search.best()
    trials = _listed(search, knobs, by_value=by_value)
    heads = ["", *(k.name for k in knobs), "seeds", heading, "least", "most", "gain", "± s.e."]
    return aligned(heads, [_line(t, search, knobs, best) for t in trials])


def _listed(search: Search, knobs: Sequence[Knob], *, by_value: bool) -> list[Trial]:
    if by_value:
        name = knobs[0].name
        return sorted(search.trials, key=lambda t: t.values[name])
    most = max(len(t.losses) for t in search.trials)
    ranked = sorted(search.trials, key=lambda t: (len(t.losses) < most, t.mean))[:_SHOWN]
    return ranked if search.present in ranked else [*ranked, search.present]


def _line(trial: Trial, search: Search, knobs: Sequence[Knob], best: Trial) -> list[str]:
    found = spread(list(trial.losses.values()))
    gain, error = trial.gain_over(search.present)
    mark = "*" if trial is best else "now" if trial is search.present else ""
    values = [f"{trial.values[k.name]:g}" for k in knobs]
    figures = [
        f"{v:.4g}" if math.isfinite(v) else "never" for v in (found.mean, found.least, found.most)
    ]
    told = [] if trial is search.present else [(gain, "+.3g"), (error, ".2g")]
    change = [f"{v:{form}}" if math.isfinite(v) else "-" for v, form in told] or ["-", "-"]
    return [mark, *values, str(len(trial.losses)), *figures, *change]


def draw(search: Search, knobs: Sequence[Knob], heading: str, path: Path) -> None:
    """Draw the change of the loss against every knob.

    Seeds differ more than candidates do, and most candidates are played on few of them. So each
    is compared with the values in force on its own seeds; bars are standard errors, and a hollow
    mark has one seed only.

    Raises:
        ConfigError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib import pyplot as plt

    columns = min(len(knobs), _COLUMNS)
    rows = -(-len(knobs) // columns)
    size = (3.4 * columns + 1.2, 3.2 * rows)
    figure, grid = plt.subplots(
        rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    axes = list(grid.flat)
    for unused in axes[len(knobs) :]:
        unused.set_axis_off()
    trials = [t for t in search.trials if t.losses and math.isfinite(t.mean)]
    for axis, knob in zip(axes, knobs, strict=False):
        axis.axhline(0.0, color=COLOURS[6], linewidth=0.8)
        for trial in trials:
            _mark(axis, trial.values[knob.name], trial, search)
        axis.set_xlabel(knob.name)
        if knob.log:
            axis.set_xscale("log")
        axis.grid(visible=True, color="0.92", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    for first in axes[::columns]:
        first.set_ylabel(f"change of {heading}")
    axes[0].set_title("less is better; orange: proposed, black: in force", loc="left", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _mark(axis: Any, x: float, trial: Trial, search: Search) -> None:
    best, present = trial is search.best(), trial is search.present
    colour = COLOURS[1] if best else COLOURS[6] if present else COLOURS[0]
    gain, error = (0.0, 0.0) if present else trial.gain_over(search.present)
    known = math.isfinite(error)
    if known:
        axis.plot([x, x], [-gain - error, -gain + error], color=colour, linewidth=1.0, alpha=0.6)
    size, fill = 7 if best or present else 4, colour if known else "none"
    axis.plot([x], [-gain], "o", color=colour, markerfacecolor=fill, markersize=size)


def contest(verdict: Verdict, heading: str, seeds: int) -> str:
    """Return the contenders on fresh seeds, best first, as a table."""
    heads = ["", f"on {seeds} fresh seeds", heading, "best is better by", "95 % interval"]
    lines = []
    for name in sorted(verdict.means, key=verdict.means.__getitem__):
        mark = "*" if name == verdict.best.name else "now" if name == PRESENT else ""
        gain = verdict.over.get(name)
        told = ["-", "-"]
        if gain is not None:
            told = [f"{gain.mean:.3g}", f"{gain.low:+.3g} to {gain.high:+.3g}"]
        elif name != verdict.best.name:
            told = ["far behind", "-"]
        lines.append([mark, name, f"{verdict.means[name]:.4g}", *told])
    return aligned(heads, lines)


def config(policy: Policy, knobs: Sequence[Knob]) -> dict[str, Any]:
    """Return the configuration that ``policy`` stands for, by where it goes.

    All that it was played with is in it: the options that are not the defaults, and ``knobs``.
    """
    known = [knob for knob in knobs if policy.dispatch.policy in knob.policies]
    names = {*changed(policy), *defaults(policy, known)}
    sections: dict[str, dict[str, Any]] = {}
    for section, options in (("dispatch", policy.dispatch), ("engine", policy.engine)):
        told = {f.name: getattr(options, f.name) for f in fields(options) if f.name in names}
        sections[section] = told
    name = policy.name.removesuffix(TUNED)
    turned = _turned(name, sections["dispatch"])
    words = " ".join(f"--{k.replace('_', '-')} {_word(v)}" for k, v in turned.items())
    found: dict[str, Any] = {
        "policies": [
            {
                "policy": name,
                "name": policy.name,
                **{k: v for k, v in sections.items() if v},
            }
        ],
        "router": f"--policy {policy.dispatch.policy} {words}".strip(),
    }
    if policy.kind is not EngineKind.HEXGEN:
        order = "priority" if policy.kind is EngineKind.PRIORITY else "fcfs"
        found["engine"] = f"vllm serve MODEL --scheduling-policy {order}"
    elif sections["engine"]:
        found["engine"] = {"order": policy.engine.order, **sections["engine"]}
    return found


def _turned(name: str, dispatch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a router: those of placement, and what engines are told to go by."""
    order = name.partition("+")[2]
    told = ORDERS[order][2] if order in ORDERS else "deadline"
    return {**dispatch, **({} if told == "deadline" else {"priority_by": told})}


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def router_config(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a configuration that ``hexgen-vllm router --config`` reads."""
    (policy,) = found["policies"]
    placement = policy["policy"].partition("+")[0]
    return {"policy": placement, **_turned(policy["policy"], policy.get("dispatch", {}))}


def write_config(path: Path, found: Mapping[str, Any]) -> None:
    """Write a configuration as YAML."""
    text = yaml.safe_dump(dict(found), sort_keys=False)
    path.write_text(text, encoding="utf-8")
