"""The demo's set-up: who is compared, on which engines, behind which router."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hexgen_vllm import demo
from hexgen_vllm.bench import peer
from hexgen_vllm.cluster import ProcessFailed
from hexgen_vllm.cluster.commands import engine_command
from hexgen_vllm.demo import (
    CONTENDERS,
    FLEETS,
    DemoOptions,
    engine_entry,
    live_config,
    router_entry,
)
from hexgen_vllm.errors import ConfigError


def test_every_contender_has_engines_that_differ_only_in_their_scheduler() -> None:
    options = DemoOptions()
    assert {contender.fleet for contender in CONTENDERS.values()} == set(FLEETS)
    for fleet in FLEETS.values():
        own = {f"--scheduler-cls={fleet.scheduler_cls}", *fleet.args}
        entry = engine_entry(options, fleet, "fast")
        rest = [a for a in entry.args if a not in own and not a.startswith("--additional-config")]
        stock = engine_entry(options, FLEETS["stock"], "fast").args
        assert set(rest) <= set(stock)


def test_only_ours_get_an_order_and_all_get_the_same_pace() -> None:
    for fleet in FLEETS.values():
        (config,) = (
            json.loads(argument.partition("=")[2])
            for argument in engine_entry(DemoOptions(), fleet, "slow").args
            if argument.startswith("--additional-config")
        )
        assert config["hexgen_pace"] == demo.DEVICES["slow"]
        assert config.get("hexgen", {}).get("order") == fleet.order


def test_all_policies_play_the_same_workflows() -> None:
    specs = [live_config(DemoOptions(), policy, 1, "http://x").specs() for policy in CONTENDERS]
    assert all(found == specs[0] for found in specs)


def test_vllm_router_is_told_of_workflows_in_its_own_way() -> None:
    told = {p: live_config(DemoOptions(), p, 0, "http://x").agentic_context for p in CONTENDERS}
    assert {policy for policy, agentic in told.items() if agentic} == set(peer.MODES)


def test_vllm_router_is_not_among_the_policies_unless_asked_for() -> None:
    assert peer.MODES.keys().isdisjoint(DemoOptions().policies)
    with pytest.raises(ConfigError, match="vllm_router must be a program, not 'no-such-program'"):
        DemoOptions(policies=("vllm_router",), vllm_router="no-such-program")


def test_simple_rules_are_played_on_stock_engines_that_go_by_deadline() -> None:
    for rule in ("least_outstanding", "sticky", "wlcaff"):
        contender = CONTENDERS[f"{rule}+edf"]
        entry = engine_entry(DemoOptions(), FLEETS[contender.fleet], "slow")
        assert contender.placement == router_entry(DemoOptions(), rule).policy == rule
        assert "--scheduling-policy=priority" in engine_command(entry, 1)


def test_program_scheduling_is_what_tells_the_modes_apart() -> None:
    plain = peer.peer_command("r", "vllm_router", 1, ["http://a", "http://b"])
    program = peer.peer_command("r", "vllm_router_program", 1, ["http://a", "http://b"])
    assert set(program) - set(plain) == {"--enable-program-scheduling"}
    assert plain[plain.index("--worker-urls") + 1 :][:2] == ["http://a", "http://b"]


async def test_a_router_that_dies_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    program = tmp_path / "router"
    program.write_text(f"#!{sys.executable}\nraise SystemExit('no such flag')\n")
    program.chmod(0o755)
    with pytest.raises(ProcessFailed, match="no such flag"):
        async with peer.vllm_router(str(program), "vllm_router", [], tmp_path / "log"):
            pass


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--policies", "fifo"], "policies must be of"),
        (["--seeds", "x"], "seeds must be whole numbers"),
        (["--rate", "0"], "rate must be"),
    ],
)
def test_bad_options_end_in_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
