"""Tables and plots of results."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from hexgen_vllm.bench import peer
from hexgen_vllm.demo import SHOWN
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.report.plot import (
    COLOURS,
    DASHES,
    STYLES,
    draw_attainment,
    look,
    styles,
    title,
)
from hexgen_vllm.report.table import (
    aligned,
    render,
    seconds,
)

ROOT = Path(__file__).resolve().parents[2]


def row(policy: str, seed: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "policy": policy,
        "seed": seed,
        "rate": 0.5,
        "workflows": 4,
        "on_time": 3,
        "p50_s": 2.0,
        "p95_s": 12.34,
        "p99_s": 123.4,
        "min_deadline_95_s": 12.0,
        "min_deadline_99_s": None,
        "ttft_p50_s": 0.0123,
        "ttft_p95_s": None,
        "errors": 1,
        "lost": 0,
        "deadline_s": 10.0,
        "latencies_s": [1.0, 2.0, 12.34, None],
        **changes,
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.01234, "0.012"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (123.4, "123"),
        (0, "0.000"),
    ],
)
def test_seconds(value: float | None, text: str) -> None:
    assert seconds(value) == text


def test_columns_are_aligned() -> None:
    assert aligned(["name", "n"], [["a", "100"], ["longer", "1"]]).split("\n") == [
        "name      n",
        "------  ---",
        "a       100",
        "longer    1",
    ]


def test_a_table_has_a_line_for_each_run() -> None:
    lines = render([row("slack"), row("round_robin+fcfs")]).split("\n\n")[0].split("\n")
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert " ".join(lines[2].split()) == (
        "slack 0 0.5 4 3 (75.0%) 12.0 - 2.00 12.3 123 0.012 - 1 0"
    )


def test_several_runs_of_a_policy_get_a_mean_with_their_range() -> None:
    rows = [
        row("slack", 1, p95_s=10.0),
        row("slack", 2, p95_s=20.0, on_time=4),
        row("paper", 1),
        row("paper", 2),
    ]
    table = render(rows).split("\n\n")
    assert len(table) == 3
    lines = table[1].split("\n")
    assert "87.5% [75.0%, 100.0%]" in lines[2]
    assert "15.0 [10.0, 20.0]" in lines[2]
    assert lines[2].split()[:3] == ["slack", "0.5", "2"]


def test_a_mean_that_one_run_lacks_is_not_made_up() -> None:
    rows = [row("slack", 1, p50_s=None), row("slack", 2)]
    mean = render(rows).split("\n\n")[1].split("\n")[2]
    assert "2.00" not in mean


def test_a_plot_is_written_where_asked(tmp_path: Path) -> None:
    rows = [row(policy, seed) for seed in (1, 2) for policy in ("slack", "paper", "third")]
    for name in ("out.png", "deeper/out.svg"):
        draw_attainment(rows, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    assert "paper" in (tmp_path / "deeper/out.svg").read_text()


def test_policies_are_told_apart_without_colour() -> None:
    assert len(set(COLOURS)) == len(COLOURS) == len(set(DASHES)) == len(DASHES)


@pytest.mark.parametrize(
    "names",
    [
        ["paper", "round_robin+fcfs", "least_outstanding+fcfs", "least_outstanding+edf", "slack"],
        ["round_robin+fcfs", "least_outstanding+fcfs", "paper", "slack"],
        [*SHOWN, *peer.MODES],
        ["slack", "another"],
    ],
    ids=["evaluation", "demo", "demo beside vllm-router", "own"],
)
def test_a_policy_looks_the_same_in_every_plot(names: list[str], tmp_path: Path) -> None:
    found = styles(names)
    assert {name: STYLES.get(name, 1) for name in names} == found
    assert len(set(found.values())) == len(names)
    draw_attainment([row(name) for name in names], tmp_path / "out.svg")
    drawn = (tmp_path / "out.svg").read_text().lower()
    for index, colour in enumerate(COLOURS[:6]):  # the axes are black, too
        assert (f"stroke: {colour.lower()}" in drawn) == (index in found.values())


def test_variants_look_like_their_policy_while_they_can() -> None:
    found = styles(["paper a=0.2", "slack", "paper a=0.4", "paper"])
    assert found == {"paper": 4, "slack": 0, "paper a=0.2": 1, "paper a=0.4": 2}
    assert styles(["round_robin+fcfs", "paper a=0.1"])["paper a=0.1"] == STYLES["paper"]
    assert styles(["another", "slack (73% right)"]) == {"slack (73% right)": 0, "another": 1}


def test_no_two_of_many_look_alike() -> None:
    chosen = styles([f"p{n}" for n in range(40)] + ["slack", "paper"])
    assert len({look(style) for style in chosen.values()}) == 42


def drawn(rows: Sequence[Mapping[str, Any]], monkeypatch: pytest.MonkeyPatch, path: Path) -> Any:
    """Return the axes of a plot."""
    kept: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.pyplot.close", kept.append)
        draw_attainment(rows, path)
    (figure,) = kept
    return figure.axes[0]


def test_ours_stands_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ["paper", "slack", "third", "slack protect"]
    axes = drawn([row(name) for name in names], monkeypatch, tmp_path / "a.png")
    by_name = {line.get_label(): line for line in axes.lines if line.get_label() in names}
    ours = [by_name["slack"], by_name["slack protect"]]
    others = [by_name["paper"], by_name["third"]]
    assert min(o.get_linewidth() for o in ours) > 1.5 * max(o.get_linewidth() for o in others)
    assert min(o.get_zorder() for o in ours) > max(o.get_zorder() for o in others)
    assert axes.get_legend().get_texts()[0].get_text() == "slack"


@pytest.mark.parametrize("slowest", [14.0, 400.0])
def test_the_axis_shows_where_something_happens(
    slowest: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fast = row("slack", latencies_s=[10.0 + i / 100 for i in range(100)], deadline_s=12.0)
    slow = row("paper", latencies_s=[10.0 + (slowest - 10) * i / 100 for i in range(100)],
               deadline_s=12.0)  # fmt: skip
    axes = drawn([fast, slow], monkeypatch, tmp_path / "a.png")
    low, high = axes.get_xlim()
    assert 7.0 <= low <= 10.0, "not from 0, where nobody is"
    assert 12.0 < high <= 8.5 * 11
    assert axes.get_xscale() == ("log" if slowest > 100 else "linear")
    assert len(axes.get_xticks()) >= 3


def test_a_title_says_what_how_many_and_which_seeds() -> None:
    found = title([row("slack", seed) for seed in (3, 1, 2)])
    for part in (str(row("slack")["workflows"]), "seeds 1, 2, 3", "on time"):
        assert part in found
    assert "seeds 1 to 9" in title([row("slack", seed) for seed in range(1, 10)])


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to draw"):
        draw_attainment([row("slack", latencies_s=[None, None])], tmp_path / "out.png")


def test_a_missing_matplotlib_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"plots need matplotlib.*hexgen-vllm\[plot\]"):
        draw_attainment([row("slack")], tmp_path / "out.png")
