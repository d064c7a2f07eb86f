"""Engines found among pods, over HTTP to an API server that also fails."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
import trustme
from kubernetes_asyncio.config import incluster_config, kube_config

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.router.engines.discovery import kubernetes as pod_source
from hexgen_vllm.router.engines.discovery.kubernetes import worker_in_pod
from hexgen_vllm.router.main import run
from hexgen_vllm.router.options import Worker
from hexgen_vllm.testing.fake_server import FakeServer, FakeSettings
from hexgen_vllm.testing.stand import Stand, open_stand
from hexgen_vllm.types import EngineState, Role
from tests.router.engines.discovery.api_server import ApiServer, api_server, pod

SELECTED: dict[str, Any] = {
    "worker_urls": (),
    "service_discovery": True,
    "selector": ("app=engine", "tier=gpu"),
    "service_discovery_namespace": "llm",
}
TERMINATING = {"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}
UNREADY = {"status": {"conditions": [{"type": "Ready", "status": "False"}]}}


@pytest.fixture
async def api(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ApiServer]:
    """An API server that forgives fast repetition."""
    monkeypatch.setattr(pod_source, "_LEAST_PAUSE_S", 0.02)
    monkeypatch.setattr(pod_source, "_MOST_PAUSE_S", 0.05)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    async with api_server() as server:
        yield server


def found_by(api: ApiServer, folder: Path, **more: Any) -> AbstractAsyncContextManager[Stand]:
    """Open a router that knows no engines but pods."""
    return open_stand(wait=False, **{**SELECTED, "kubeconfig": api.kubeconfig(folder), **more})


def names(stand: Stand) -> set[str]:
    return {engine.name for engine in stand.context.fleet.ready()}


def lookups(stand: Stand, outcome: str) -> int:
    return int(stand.context.discovery.books[0].lookups[outcome])


async def test_ready_pods_join_and_leave(api: ApiServer, tmp_path: Path) -> None:
    async with FakeServer() as one, FakeServer() as two, FakeServer() as three:
        for name, engine in (("e-0", one), ("e-1", two), ("e-2", three)):
            api.put(pod(name, engine.port))
        async with found_by(api, tmp_path) as stand:
            await stand.until(lambda: names(stand) == {"e-0", "e-1", "e-2"})
            asked = api.queries[0]
            assert (asked["path"], asked["labelSelector"]) == (
                "/api/v1/namespaces/llm/pods", "app=engine,tier=gpu",
            )  # fmt: skip
            assert api.asked["list"] == 2, "two pages"
            api.put(pod("e-0", one.port, **UNREADY))
            await stand.until(lambda: names(stand) == {"e-1", "e-2"})
            api.put(pod("e-0", one.port))
            await stand.until(lambda: names(stand) == {"e-0", "e-1", "e-2"})
            api.delete("e-1")
            await stand.until(lambda: names(stand) == {"e-0", "e-2"})
            assert api.asked["watch"] == 1
            stand.assert_settled()


async def test_a_terminating_pod_is_drained_and_its_streams_are_not_cut(
    api: ApiServer, tmp_path: Path
) -> None:
    slow = FakeSettings(step_s=0.02)
    async with FakeServer(slow) as one, FakeServer() as two:
        api.put(pod("e-0", one.port))
        async with found_by(api, tmp_path) as stand:
            fleet = stand.context.fleet.engines
            await stand.until(lambda: names(stand) == {"e-0"})
            async with stand.post(stream=True, max_tokens=40, ignore_eos=True) as answer:
                await answer.content.readline()
                api.put(pod("e-1", two.port))
                api.put(pod("e-0", one.port, **TERMINATING))
                await stand.until(lambda: names(stand) == {"e-1"})
                assert fleet["e-0"].state is EngineState.DRAINING
                async with stand.post() as other:
                    assert other.headers["x-hexgen-engine"] == "e-1"
                text = (await answer.read()).decode()
            assert "t39" in text
            assert text.endswith("data: [DONE]\n\n")
            await stand.until(lambda: list(fleet) == ["e-1"])


async def test_a_pod_that_takes_the_name_of_one_that_drains_waits_for_it(
    api: ApiServer, tmp_path: Path
) -> None:
    async with FakeServer(FakeSettings(step_s=0.02)) as one, FakeServer() as two:
        api.put(pod("e-0", one.port))
        async with found_by(api, tmp_path) as stand:
            fleet = stand.context.fleet.engines
            await stand.until(lambda: names(stand) == {"e-0"})
            async with stand.post(stream=True, max_tokens=20, ignore_eos=True) as answer:
                await answer.content.readline()
                api.put(pod("e-0", two.port))
                await stand.until(lambda: not names(stand))
                assert "t19" in (await answer.read()).decode()
            await stand.until(lambda: names(stand) == {"e-0"})
            assert fleet["e-0"].worker.url == two.url


async def test_a_version_that_is_too_old_means_a_new_list(api: ApiServer, tmp_path: Path) -> None:
    async with FakeServer() as one, FakeServer() as two:
        api.put(pod("e-0", one.port))
        async with found_by(api, tmp_path) as stand:
            await stand.until(lambda: names(stand) == {"e-0"} and api.asked["watch"])
            api.pods["e-1"] = pod("e-1", two.port)
            api.change_unseen()
            await stand.until(lambda: names(stand) == {"e-0", "e-1"})
            assert lookups(stand, "gone") == 1
            assert api.asked["list"] == 2


async def test_a_watch_that_breaks_goes_on_where_it_was(api: ApiServer, tmp_path: Path) -> None:
    async with FakeServer() as one, FakeServer() as two:
        api.put(pod("e-0", one.port))
        async with found_by(api, tmp_path) as stand:
            await stand.until(lambda: names(stand) == {"e-0"} and api.asked["watch"])
            api.drop()
            api.put(pod("e-1", two.port))
            await stand.until(lambda: names(stand) == {"e-0", "e-1"})
            assert api.asked["list"] == 1
            assert int(api.queries[-1]["resourceVersion"]) >= 1


@pytest.mark.parametrize(
    ("status", "outcome", "said"),
    [
        (403, "forbidden", "does not let this account list and watch pods in namespace llm"),
        (401, "unauthorized", "no answer reason=unauthorized kept=1"),
        (500, "error", "no answer reason=error kept=1"),
        (410, "gone", ""),
    ],
)
async def test_while_the_server_refuses_everything_stays(
    api: ApiServer,
    tmp_path: Path,
    status: int,
    outcome: str,
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with FakeServer() as one:
        api.put(pod("e-0", one.port))
        async with found_by(api, tmp_path) as stand:
            await stand.until(lambda: names(stand) == {"e-0"} and api.asked["watch"])
            api.status = status
            api.drop()
            await stand.until(lambda: lookups(stand, outcome) >= 3)
            assert names(stand) == {"e-0"}
            assert said in caplog.text
            assert caplog.text.count(said) == 1 or not said
            api.status = 0
            api.delete("e-0")
            await stand.until(lambda: not stand.context.fleet.engines)


async def test_a_server_that_is_not_there_keeps_the_router_up(
    api: ApiServer, tmp_path: Path
) -> None:
    path = api.kubeconfig(tmp_path)
    Path(path).write_text(Path(path).read_text().replace(api.url, "http://127.0.0.1:9"))
    async with open_stand(wait=False, **{**SELECTED, "kubeconfig": path}) as stand:
        await stand.until(lambda: lookups(stand, "unreachable"))
        async with stand.get("/readiness") as ready, stand.get("/liveness") as live:
            assert (ready.status, live.status) == (503, 200)


async def test_without_a_namespace_all_are_asked_and_names_say_which(
    api: ApiServer, tmp_path: Path
) -> None:
    async with FakeServer() as one:
        api.put(pod("e-0"))
        port = {"service_discovery_namespace": None, "service_discovery_port": one.port}
        async with found_by(api, tmp_path, **port) as stand:
            await stand.until(lambda: names(stand) == {"llm.e-0"})
            assert api.queries[0]["path"] == "/api/v1/pods"


async def test_within_a_cluster_the_account_of_the_pod_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, tls = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    (tmp_path / "token").write_text("of-the-account")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.crt"))
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    async with api_server(tls) as api, FakeServer() as one:
        api.token = "of-the-account"
        api.put(pod("e-0", one.port))
        host, port = api.url.removeprefix("https://").split(":")
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
        async with open_stand(wait=False, **SELECTED) as stand:
            await stand.until(lambda: names(stand) == {"e-0"})


async def test_a_wrong_kubeconfig_is_one_sentence(tmp_path: Path) -> None:
    texts = {"empty": "", "list": "[1]", "broken": "a: [", "half": "kind: Config", "nul": "\0"}
    for name, text in texts.items():
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(ConfigError) as raised:
            async with open_stand(wait=False, **{**SELECTED, "kubeconfig": str(path)}):
                pass
        assert str(raised.value).startswith(f"kubeconfig {path} cannot be used: ")
        assert "object" not in str(raised.value)
        assert "\n" not in str(raised.value)
        assert str(raised.value).endswith(".")


def test_without_any_cluster_the_sentence_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    assert run(["--service-discovery", "--selector", "app=x", "--port", "0"]) == 2
    assert "service_discovery finds no cluster: " in capsys.readouterr().err


def test_a_missing_kubeconfig_ends_the_router(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--service-discovery --selector app=x --port 0 --kubeconfig /nowhere"
    assert run(words.split()) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.endswith("kubeconfig must be a file, and /nowhere is none.")


@pytest.mark.parametrize(
    ("described", "worker"),
    [
        (pod("a"), Worker("a", "http://127.0.0.1:8000")),
        (pod("a", 9), Worker("a", "http://127.0.0.1:9")),
        (pod("a", status={"podIP": "fd00::1"}), Worker("a", "http://[fd00::1]:8000")),
        (
            pod("a", metadata={"annotations": {"hexgen-vllm/role": "decode"}}),
            Worker("a", "http://127.0.0.1:8000", role=Role.DECODE),
        ),
        (
            pod("a", metadata={"labels": {"llm-d.ai/role": "prefill"}}),
            Worker("a", "http://127.0.0.1:8000", role=Role.PREFILL),
        ),
        (
            pod("a", metadata={"labels": {"llm-d.ai/role": "prefill-decode"}}),
            Worker("a", "http://127.0.0.1:8000"),
        ),
        (pod("a", "http"), None),
        (pod("a", 65536), None),
        (pod("a", status={"podIP": ""}), None),
        (pod("a", status={"podIP": None}), None),
        (pod("a", **TERMINATING), None),
        (pod("a", **UNREADY), None),
        (pod("a", status={"conditions": None}), None),
        (pod(""), None),
        ({}, None),
        ({"metadata": [], "status": 7}, None),
    ],
)
def test_which_pods_are_engines(described: dict[str, Any], worker: Worker | None) -> None:
    assert worker_in_pod(described, 8000, qualified=False) == worker
