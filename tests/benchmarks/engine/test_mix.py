"""What one engine makes of calls with deadlines beside calls without, in the simulator."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.engine.mix import by_class, play
from benchmarks.engine.mix_scenarios import LONG, SHORT, mixed, overload
from hexgen_vllm import cli
from hexgen_vllm.config import EngineOptions

OURS = EngineOptions()
UNSEEN = 77
"""A seed that nothing was tuned on."""


def test_interactive_calls_are_on_time_beside_a_backlog() -> None:
    mix = mixed(UNSEEN, slots=256, bursts=True, seconds=180.0)
    most = play(mix, mix.batch).batch
    ours, stock = play(mix, mix.all, OURS), play(mix, mix.all, rank=by_class)
    assert ours.interactive >= 95.0
    assert ours.batch >= 0.9 * most
    assert stock.interactive < 50.0
    assert ours.given_up > 0
    off = play(mix, mix.all, replace(OURS, pace=False))
    assert off.interactive < 60.0
    assert off.given_up == 0


def test_interactive_calls_that_come_all_the_time_leave_most_to_batch() -> None:
    mix = mixed(UNSEEN, slots=256, bursts=False, seconds=180.0)
    most = play(mix, mix.batch).batch
    ours = play(mix, mix.all, OURS)
    assert ours.interactive >= 98.0
    assert ours.batch >= 0.64 * most, "a hard seed; the mean of others is 0.76"


def test_few_places_are_given_up_at_once() -> None:
    mix = mixed(UNSEEN, slots=32, bursts=True, seconds=180.0)
    ours, stock = play(mix, mix.all, OURS), play(mix, mix.all, rank=by_class)
    assert ours.interactive >= 98.0
    assert ours.batch >= stock.batch


def test_batch_keeps_its_share_however_many_deadlines_there_are() -> None:
    mix = mixed(UNSEEN, slots=256, bursts=False, seconds=180.0)
    hard = replace(mix, deadlines_s=lambda s: 0.5 if s.type != "batch" else math.inf)
    most = play(mix, mix.batch).batch
    half = play(hard, hard.all, replace(OURS, interactive_share=0.5, demote_late=False)).batch
    least = play(hard, hard.all, replace(OURS, interactive_share=1.0, demote_late=False)).batch
    assert half > least
    assert half >= 0.35 * most, "half of the turns, in steps that interactive calls make longer"


@pytest.mark.parametrize("seed", [UNSEEN, UNSEEN + 1])
def test_better_estimates_of_lengths_never_make_it_worse(seed: int) -> None:
    mix = overload(seed, seconds=400.0)
    mean, learned, true = (
        play(mix, mix.all, OURS, estimates=how) for how in ("mean", "learned", "true")
    )
    edf = play(mix, mix.all, rank=lambda flow, call, outlook: flow.deadline_s)
    assert mean.interactive <= learned.interactive <= true.interactive
    assert learned.interactive > edf.interactive + 25.0
    assert learned.on_time[SHORT] >= 95.0
    assert learned.on_time[LONG] >= 55.0, "few of them in so short a time; long runs have 75"


def test_calls_that_say_nothing_run_as_in_stock_vllm() -> None:
    mix = mixed(UNSEEN, slots=256, bursts=True, seconds=150.0)
    plain = replace(mix, deadlines_s=lambda _: math.inf)
    assert play(plain, mix.batch, OURS).batch == pytest.approx(
        play(plain, mix.batch).batch, rel=0.01
    )


def test_the_command_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mix.json"
    said = ["bench", "mix", "--scenarios", "A", "C", "plain", "--seeds", "5", "--seconds", "130"]
    plot = tmp_path / "mix.png"
    assert cli.main([*said, "--json", str(out), "--plot", str(plot)]) == 0
    assert plot.stat().st_size > 10_000
    found = json.loads(out.read_text())
    assert {"interactive_pct_of_alone", "batch_pct", "batch_pct_swap"} <= set(found["A"])
    assert {"short_pct", "long_pct"} <= set(found["C"])
    assert 0.99 <= found["plain_over_stock"] <= 1.01
    assert "priority, 128 places" in capsys.readouterr().out
    assert cli.main(["bench", "mix", "--seconds", "5"]) == 2
