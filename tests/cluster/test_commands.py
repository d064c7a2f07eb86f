from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from hexgen_vllm.cluster import EngineEntry, RouterEntry
from hexgen_vllm.cluster.commands import engine_command, engine_env, flags, router_command
from hexgen_vllm.errors import ConfigError


def test_options_become_flags() -> None:
    options = {"max_num_seqs": 8, "eager": True, "cache": False, "ids": [1, 2], "extra": {"a": 1}}
    assert flags(options) == [
        "--max-num-seqs=8",
        "--eager",
        "--no-cache",
        "--ids",
        "1",
        "2",
        '--extra={"a": 1}',
    ]


def test_our_scheduler_runs_through_our_drop_in() -> None:
    entry = EngineEntry(name="a", model="m", args=("--seed=1",), hexgen={"displace": False})
    assert engine_command(entry, 8001) == [
        *(sys.executable, "-m", "hexgen_vllm.serve", "m"),
        *("--host=127.0.0.1", "--port=8001", "--no-hexgen-displace", "--seed=1"),
    ]


@pytest.mark.parametrize("scheduler", ["fcfs", "priority"])
def test_stock_schedulers_run_through_stock_vllm(scheduler: str) -> None:
    entry = EngineEntry(name="a", model="m", scheduler=scheduler, args=("--seed=1",))
    command = engine_command(entry, 8001)
    assert command[1:4] == ["-m", "vllm.entrypoints.openai.api_server", "--model=m"]
    assert f"--scheduling-policy={scheduler}" in command
    assert not any("hexgen" in word for word in command[1:])


def test_an_own_command_gets_host_and_port() -> None:
    entry = EngineEntry(name="a", command=("serve-it", "--listen", "{host}:{port}"))
    assert engine_command(entry, 8001) == ["serve-it", "--listen", "127.0.0.1:8001"]


def test_device_and_env_become_variables_and_env_wins() -> None:
    assert engine_env(EngineEntry(name="a", model="m")) == {}
    entry = EngineEntry(name="a", model="m", device="0,1", env={"A": "b"})
    assert engine_env(entry) == {"CUDA_VISIBLE_DEVICES": "0,1", "A": "b"}


def router(entry: RouterEntry, *engines: EngineEntry) -> list[str]:
    pairs = [(engine, f"http://{engine.name}") for engine in engines]
    return router_command(entry, 8080, pairs, 15.0)


OURS = EngineEntry(name="ours", model="m")
FCFS = EngineEntry(name="fcfs", model="m", scheduler="fcfs")
PRIORITY = EngineEntry(name="priority", model="m", scheduler="priority")
THERE = EngineEntry(name="there", url="http://there")


def test_the_router_gets_its_options_and_the_engines_by_name() -> None:
    entry = RouterEntry(policy="paper", options={"alpha": 0.5, "queue-size": 7})
    assert router(entry, OURS, THERE) == [
        *(sys.executable, "-m", "hexgen_vllm.router"),
        *("--host=127.0.0.1", "--port=8080", "--policy=paper", "--shutdown-timeout=15.0"),
        *("--alpha=0.5", "--queue-size=7"),
        *("--worker-urls", "ours=http://ours", "there=http://there"),
    ]


@pytest.mark.parametrize(
    ("engines", "told"),
    [
        ((OURS, FCFS), ["--stock-scheduling=fcfs"]),
        ((PRIORITY, PRIORITY), ["--stock-scheduling=priority"]),
        ((FCFS, PRIORITY), []),
        ((OURS, THERE), []),
    ],
)
def test_the_router_is_told_how_stock_engines_order(
    engines: tuple[EngineEntry, ...], told: list[str]
) -> None:
    words = router(RouterEntry(), *engines)
    assert [word for word in words if word.startswith("--stock-scheduling")] == told


def test_options_of_the_file_win_over_what_the_cluster_knows() -> None:
    entry = RouterEntry(options={"stock-scheduling": "auto", "shutdown_timeout": 1})
    words = router(entry, FCFS)
    assert "--stock-scheduling=auto" in words
    assert "--shutdown-timeout=1" in words
    assert len([word for word in words if word.startswith("--shutdown")]) == 1


def test_the_router_is_told_of_roles() -> None:
    engines = [replace(OURS, name=role, role=role) for role in ("prefill", "decode", "both")]
    assert router(RouterEntry(), *engines)[-4:] == [
        "--worker-urls",
        "prefill=http://prefill?role=prefill",
        "decode=http://decode?role=decode",
        "both=http://both",
    ]
    with pytest.raises(ConfigError, match="role must be one of both, prefill, decode"):
        replace(OURS, role="Prefill")
