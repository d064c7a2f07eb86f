"""What becomes of a search: proposals beyond noise only, against what is in force and rivals."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import pytest
import yaml

from hexgen_vllm.cli import main
from hexgen_vllm.config import DispatchOptions, EngineOptions
from hexgen_vllm.recent import RecentCall, RecentWorkflow, Ring
from hexgen_vllm.router.main import read_options
from hexgen_vllm.router.tuning import proposal_of
from hexgen_vllm.sim.policies import Policy, named
from hexgen_vllm.sim.scenario_file import load
from hexgen_vllm.tune.knobs import KNOBS
from hexgen_vllm.tune.online import PRESENT, Action, OnlineOptions, OnlineTuner
from hexgen_vllm.tune.traffic import Live, Traffic
from hexgen_vllm.tune.verdict import Entrant, Verdict, judge, paired, race, t_quantile

SEEDS = [1, 2, 3, 4, 5]
NOISE = (0.0, 1.0, -1.0, 0.5, -0.5)


def contender(name: str, mean: float, noise: Sequence[float] = (0.0,) * 5) -> Entrant:
    """Return one whose losses share the seeds' ups and downs, and have some noise of their own."""
    losses = {s: mean + 40.0 * s + n for s, n in zip(SEEDS, noise, strict=True)}
    return Entrant(name, named("slack"), losses)


def verdict(*contenders: Entrant) -> Verdict:
    return judge(contenders, SEEDS)


def test_a_clear_gain_over_all_is_proposed() -> None:
    found = verdict(
        contender(PRESENT, 100.0), contender("slack tuned", 90.0, NOISE), contender("other", 99.0)
    )
    assert found.proposed is not None
    assert found.proposed.name == "slack tuned"
    assert found.gain.low > 8.0
    assert found.over["other"].beyond_noise


def test_a_gain_within_the_noise_is_not() -> None:
    found = verdict(contender(PRESENT, 100.0), contender("slack tuned", 99.6, NOISE))
    assert found.proposed is None
    assert "within the noise" in found.why


def test_a_gain_that_a_rival_has_as_well_is_not() -> None:
    found = verdict(
        contender(PRESENT, 100.0), contender("slack tuned", 90.0, NOISE), contender("r", 90.3)
    )
    assert found.proposed is None
    assert "no better than r" in found.why


def test_a_rival_that_beats_all_is_proposed() -> None:
    found = verdict(
        contender(PRESENT, 100.0), contender("slack tuned", 96.0, NOISE), contender("r", 80.0)
    )
    assert found.proposed is not None
    assert (found.proposed.name, found.found.name) == ("r", "slack tuned")


def test_what_is_in_force_stays_when_nothing_is_better() -> None:
    found = verdict(contender(PRESENT, 90.0), contender("slack tuned", 95.0))
    assert (found.proposed, found.why) == (None, "nothing better was found")


def test_what_nobody_reaches_is_no_infinite_gain() -> None:
    lost = contender(PRESENT, 100.0)
    lost.losses = dict.fromkeys(SEEDS, math.inf)
    for found in (verdict(lost, contender("slack tuned", 90.0)), verdict(lost)):
        told = json.dumps(found.told(), allow_nan=False)
        assert "Infinity" not in told


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = random.Random(4)
    held = 0
    for _ in range(2000):
        gains = [rng.gauss(3.0, 2.0) for _ in range(5)]
        found = paired([50.0 + g for g in gains], [50.0] * 5)
        held += found.low <= 3.0 <= found.high
    assert held / 2000 == pytest.approx(0.95, abs=0.015)
    assert t_quantile(20) > t_quantile(21) > 1.96


def test_differences_are_taken_seed_by_seed() -> None:
    found = paired([10.0, 200.0, 3000.0], [9.0, 199.0, 2999.0])
    assert (found.mean, found.low) == (1.0, 1.0)
    with pytest.raises(ValueError, match="two seeds"):
        paired([1.0], [0.5])


def test_rivals_far_behind_leave_the_race_and_the_first_two_do_not() -> None:
    losses = {PRESENT: 300.0, "slack tuned": 250.0, "good": 100.0, "near": 110.0, "bad": 200.0}
    policies = {name: named("slack") for name in losses}
    names = {id(policy): name for name, policy in policies.items()}
    contenders = [Entrant(name, policy) for name, policy in policies.items()]

    def play(tasks: Sequence[tuple[Policy, int]]) -> list[float]:
        return [losses[names[id(policy)]] + seed for policy, seed in tasks]

    race(contenders, SEEDS, play)
    assert {c.name: len(c.losses) for c in contenders} == {
        PRESENT: 5, "slack tuned": 5, "good": 5, "near": 5, "bad": 2,
    }  # fmt: skip
    assert judge(contenders, SEEDS).best.name == "good"
    assert "bad" not in judge(contenders, SEEDS).over


def test_noise_alone_is_seldom_proposed() -> None:
    """The best of many that are all the same is not, although it looks better on its own seeds."""
    rng = random.Random(9)
    proposed = 0
    for _ in range(400):
        losses = [[rng.gauss(100.0, 5.0) for _ in SEEDS] for _ in range(6)]
        contenders = [
            Entrant(f"c{i}", named("slack"), dict(zip(SEEDS, each, strict=True)))
            for i, each in enumerate(losses)
        ]
        proposed += judge(contenders, SEEDS).proposed is not None
    assert proposed <= 0.05 * 400


def test_every_number_that_declares_a_range_is_a_knob() -> None:
    declared = {
        one.name
        for options in (DispatchOptions, EngineOptions)
        for one in options.__dataclass_fields__.values()
        if one.metadata["tuned"] is not None
    }
    assert {knob.name for knob in KNOBS} == declared
    assert len(declared) >= 5


FAST = ["--workflows=30", "--warmup=0", "--seed", "1", "2", "--confirm=4"]


@pytest.fixture
def tune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[dict, str]]:  # type: ignore[type-arg]
    cost = {"c0": 0.02, "c1": 1e-3, "c2": 0, "p0": 0, "p1": 2e-4, "p2": 0}
    slow = {key: 4 * value for key, value in cost.items()}
    engines = [
        {"name": name, "cost": c, "max_num_seqs": 4, "kv_tokens": 40_000}
        for name, c in (("fast", cost), ("slow", slow))
    ]
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(yaml.safe_dump({"fleet": engines}))
    ring = Ring()
    for i in range(40):
        calls = tuple(RecentCall("think", float(k), 1.0, 500 + i, 20, 300) for k in range(3))
        ring.add(RecentWorkflow("loop", 0.35 * i, calls, deadline_s=8.0, latency_s=3.0))
    (tmp_path / "recent.jsonl").write_text(ring.text())

    def run(*argv: str) -> tuple[dict[str, object], str]:
        out = tmp_path / "out.json"
        common = [f"--fleet={fleet}", f"--trace={tmp_path / 'recent.jsonl'}", *FAST]
        written = [f"--json={out}", f"--out={tmp_path / 'p.yaml'}"]
        written.append(f"--router-out={tmp_path / 'r.yaml'}")
        assert main(["tune", *common, *written, *argv]) == 0
        told = out.read_text()
        assert "Infinity" not in told
        assert "NaN" not in told
        return json.loads(told)[0], capsys.readouterr().out

    return run


def test_it_keeps_what_there_is_and_says_so(
    tune: Callable[..., tuple[dict, str]],  # type: ignore[type-arg]
    tmp_path: Path,
) -> None:
    row, text = tune("--rivals", "none", "--budget=6", "--knobs", "length_quantile")
    assert row["verdict"]["keep"]
    assert "keep what you have" in text
    assert "inf" not in text.replace("in force", "").replace("infer", "")
    assert row["proposed"] == {"length_quantile": 0.5}
    assert yaml.safe_load((tmp_path / "p.yaml").read_text())["policies"][0]["policy"] == "slack"


def test_it_proposes_a_rival_that_is_best(
    tune: Callable[..., tuple[dict, str]],  # type: ignore[type-arg]
    tmp_path: Path,
) -> None:
    argv = ("--policy=paper", "--dispatch", "alpha=1", "--knobs", "slack_quantile", "--budget=6")
    row, text = tune(*argv, "--rivals", "wlcaff+srpt", "--rate=2.4", "--workflows=60")
    assert row["verdict"]["policy"] == "wlcaff+srpt", text
    assert "proposed: wlcaff+srpt" in text
    proposed = yaml.safe_load((tmp_path / "p.yaml").read_text())
    assert "--policy wlcaff" in proposed["router"]
    assert "--priority-by remaining" in proposed["router"]
    assert "--scheduling-policy priority" in proposed["engine"]
    _, dispatch = read_options(tmp_path / "r.yaml")
    assert (dispatch["policy"], dispatch["priority_by"]) == ("wlcaff", "remaining")
    fleet = yaml.safe_load((tmp_path / "fleet.yaml").read_text())
    scenario = tmp_path / "s.yaml"
    told = {**fleet, "arrivals": {"rates": [1.0]}, "policies": proposed["policies"]}
    scenario.write_text(yaml.safe_dump(told))
    (policy,) = load(scenario).policies
    assert policy.dispatch.policy == "wlcaff"


def test_all_that_a_gain_includes_is_written(
    tune: Callable[..., tuple[dict, str]],  # type: ignore[type-arg]
    tmp_path: Path,
) -> None:
    """Options in force that the search did not turn are part of what was played."""
    tune("--rivals", "none", "--budget=6", "--knobs", "stretch", "--dispatch", "hold_depth=5",
         "externality=0.4")  # fmt: skip
    proposed = yaml.safe_load((tmp_path / "p.yaml").read_text())
    dispatch = proposed["policies"][0]["dispatch"]
    assert (dispatch["hold_depth"], dispatch["externality"]) == (5, 0.4)
    assert "stretch" in dispatch
    assert "--hold-depth 5" in proposed["router"]
    _, turned = read_options(tmp_path / "r.yaml")
    assert (turned["hold_depth"], turned["externality"]) == (5, 0.4)


def test_it_tunes_for_deadlines_of_workflows_of_their_own(
    tune: Callable[..., tuple[dict, str]],  # type: ignore[type-arg]
) -> None:
    row, text = tune("--rivals", "none", "--budget=6", "--knobs", "stretch", "--deadline-by=own")
    assert "own time alone" in text
    assert all(0.3 < loss < 30 for loss in row["trials"][0]["losses"].values())
    assert fmean(row["trials"][0]["losses"].values()) != row["deadline_s"]


def online(mode: str) -> OnlineTuner:
    options = OnlineOptions(tune=mode, tune_workflows=40, tune_least_s=10.0)
    tuner = OnlineTuner(options, {"alpha": 0.2}, 0.0)
    tuner.search_started(Traffic(1.0, 1.0, 1.0, 1.0), "first", 0.0)
    return tuner


def written(found: Verdict, values: dict[str, float]) -> dict[str, object]:
    trials = [{"values": {"alpha": 0.2}, "losses": {"1": 100.0}}]
    return {"proposed": values, "trials": trials, "verdict": found.told()}


LIVE = Live(220.0, 1.0)


def test_a_router_takes_a_verdict_at_its_word() -> None:
    kept = verdict(contender(PRESENT, 100.0), contender("slack tuned", 99.6, NOISE))
    tuner = online("auto")
    proposal = proposal_of(written(kept, {"alpha": 0.2}))
    assert tuner.proposed(proposal, LIVE, 50, 1.0) is Action.NOTHING
    assert "within the noise" in tuner.history[-1].why
    better = contender("slack tuned", 60.0, NOISE)
    better.policy = named("slack")
    found = verdict(contender(PRESENT, 100.0), better)
    told = written(found, {"alpha": 0.6})
    told["verdict"]["policy"] = "slack tuned"  # type: ignore[index]
    tuner = online("auto")
    assert tuner.proposed(proposal_of(told), LIVE, 50, 1.0) is Action.APPLY
    assert tuner.values == {"alpha": 0.6}


def test_a_router_suggests_another_policy_and_does_not_turn_to_it() -> None:
    rival = contender("wlcaff+edf", 60.0)
    rival.policy = named("wlcaff+edf")
    found = verdict(contender(PRESENT, 100.0), rival)
    tuner = online("auto")
    proposal = proposal_of(written(found, {}))
    assert tuner.proposed(proposal, LIVE, 50, 1.0) is Action.NOTHING
    state = tuner.state(2.0)
    assert (state["suggested_policy"], state["suggested"]) == ("wlcaff+edf", {})
    assert tuner.values == {"alpha": 0.2}
