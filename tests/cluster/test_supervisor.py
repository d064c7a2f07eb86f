from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from hexgen_vllm.cluster import Cluster, ClusterSpec, EngineEntry, ProcessFailed
from hexgen_vllm.cluster.processes import Backoff
from hexgen_vllm.cluster.supervisor import base_url
from hexgen_vllm.errors import ConfigError
from tests.cluster.fakes import are_gone, ask, fake_cluster, fake_engine, is_alive, make_die


def pids(cluster: Cluster) -> list[int]:
    return [pid for url in cluster.engine_urls for pid in ask(url)["pids"]]


async def test_engines_run_inside_and_are_gone_outside(tmp_path: Path) -> None:
    spec = fake_cluster(tmp_path, fake_engine("a", env={"FAKE_WORD": "x"}), fake_engine("b"))
    async with Cluster(spec) as cluster:
        words = [ask(url)["word"] for url in cluster.engine_urls]
        started = pids(cluster)
        assert words == ["x", os.environ.get("FAKE_WORD")]
        assert all(map(is_alive, started))
    assert are_gone(started)
    assert {path.name for path in tmp_path.iterdir()} == {"a.log", "b.log"}


async def test_a_server_of_others_is_used_and_left_alone(tmp_path: Path) -> None:
    async with Cluster(fake_cluster(tmp_path, fake_engine("a"))) as theirs:
        url = theirs.engine_urls[0]
        entry = EngineEntry(name="there", url=url + "/")
        async with Cluster(fake_cluster(tmp_path / "ours", entry)) as ours:
            assert ours.engine_urls == (url,)
            assert ours.processes == ()
        assert is_alive(ask(url)["pids"][0])


async def test_a_cluster_without_router_has_no_router_url(tmp_path: Path) -> None:
    async with Cluster(fake_cluster(tmp_path, fake_engine("a"))) as cluster:
        with pytest.raises(ConfigError, match="router is not running"):
            _ = cluster.router_url


async def test_a_death_while_starting_shows_the_log_and_stops_the_others(tmp_path: Path) -> None:
    cluster = Cluster(fake_cluster(tmp_path, fake_engine("bad", "dies"), fake_engine("good")))
    with pytest.raises(ProcessFailed, match="engine bad ended with exit code 3") as caught:
        await cluster.start()
    assert str(caught.value).endswith("  first line\n  no luck today")
    await cluster.stop()
    assert all(process.exit_code is not None for process in cluster.processes)


async def test_a_command_that_is_not_there_is_named(tmp_path: Path) -> None:
    spec = fake_cluster(tmp_path, EngineEntry(name="a", command=("/no/such/program",)))
    with pytest.raises(ProcessFailed, match="/no/such/program cannot be started: No such file"):
        await Cluster(spec).__aenter__()


async def test_who_is_never_healthy_is_given_up(tmp_path: Path) -> None:
    entry = EngineEntry(name="a", command=("sleep", "60"))
    cluster = Cluster(fake_cluster(tmp_path, entry, start_timeout_s=0.3))
    with pytest.raises(ProcessFailed, match=r"engine a was not healthy after 0\.3 s"):
        await cluster.__aenter__()
    assert cluster.processes[0].exit_code == -15


async def test_who_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    spec = fake_cluster(
        tmp_path, fake_engine("a", "stubborn"), fake_engine("b", "parent"), stop_grace_s=0.3
    )
    async with Cluster(spec) as cluster:
        started = pids(cluster)
        assert len(started) == 3
        codes = cluster.processes
    assert [process.exit_code for process in codes] == [-9, -15]
    assert are_gone(started)


async def test_a_death_at_run_time_ends_the_watch(tmp_path: Path) -> None:
    spec = fake_cluster(tmp_path, fake_engine("a"), fake_engine("b"))
    async with Cluster(spec) as cluster:
        watch = asyncio.ensure_future(cluster.watch())
        await asyncio.to_thread(make_die, cluster.engine_urls[1])
        with pytest.raises(ProcessFailed, match=r"engine b died with exit code 7(.|\n)*asked to"):
            await watch


async def test_with_restart_a_dead_engine_comes_back_at_its_place(tmp_path: Path) -> None:
    said: asyncio.Queue[str] = asyncio.Queue()
    spec = fake_cluster(tmp_path, fake_engine("a"), restart=True, restart_after_s=0.01)
    async with Cluster(spec, report=said.put_nowait) as cluster:
        url, before = cluster.engine_urls[0], pids(cluster)
        watch = asyncio.ensure_future(cluster.watch())
        for _ in range(2):
            await asyncio.to_thread(make_die, url)
            while await said.get() != "engine a: healthy":
                pass
        while not said.empty():
            said.get_nowait()
        assert cluster.engine_urls == (url,)
        assert pids(cluster) != before
        assert not watch.done()
        watch.cancel()


def test_backoff_doubles_up_to_a_limit_and_forgets_after_a_long_life() -> None:
    backoff = Backoff(1.0)
    assert [backoff.after(1.0) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert backoff.after(61.0) == 1
    assert backoff.after(1.0) == 2


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("fe80::1", "http://[fe80::1]:80"),
    ],
)
def test_servers_are_reached_where_they_listen(host: str, url: str) -> None:
    assert base_url(host, 80) == url


def test_a_spec_made_in_python_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="model, url or command is missing"):
        ClusterSpec(engines=(EngineEntry(name="a"),))
