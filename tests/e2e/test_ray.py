"""Real engines on three raylets: placed, lost with a node, added and taken away under load."""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.cluster.fakes import is_alive
from tests.cluster.ray.raylets import ENVIRONMENT, Raylets
from tests.e2e.programs import Server, Spawned, free_port, small_engine, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

LONG = {"model": "tiny", "prompt": "SELECT", "max_tokens": 300, "ignore_eos": True, "stream": True}
PACED = (  # steps that mostly sleep leave the cores to engines that start
    "--scheduler-cls=hexgen_vllm.testing.pace.PacedUrgencyScheduler",
    '--additional-config={"hexgen_pace": {"step_ms": 60}}',
)


def cluster_file(tmp_path: Path, model: str, port: int) -> Path:
    words = [word for word in small_engine(0) if not word.startswith(("--host", "--port"))]
    cluster: dict[str, Any] = {
        "defaults": {
            "model": model,
            "args": [*words, *PACED],
            # What they log names their processes.
            "env": {"VLLM_ENABLE_V1_MULTIPROCESSING": 0, "VLLM_LOGGING_LEVEL": "INFO"},
            "ray": {"num_cpus": 0},
        },
        "engines": [
            {"name": "slow", "ray": {"resources": {"slow": 1}}},
            {"name": "fast", "ray": {"resources": {"fast": 1}, "max_replicas": 2}},
        ],
        "router": {"policy": "least_outstanding", "port": port},
        "log_dir": str(tmp_path / "logs"),
        "ray": {
            "interval_s": 0.5,
            "scaling": {
                "horizon_s": 5,
                "up_load": 0.6,
                "down_load": 0.5,
                "cooldown_s": 0,
                "down_after_s": 2,
            },
        },
    }
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(cluster))
    return path


class Calls:
    """Calls through the router, and what became of them."""

    def __init__(self, router: Server) -> None:
        self.router = router
        self.ends: Counter[str] = Counter()
        self._counting = threading.Lock()

    def ended(self, how: str) -> None:
        """Count a call that ended."""
        with self._counting:
            self.ends[how] += 1

    def make(self, tokens: int) -> None:
        """Make a call of some length; any answer is taken note of."""
        body = {"model": "tiny", "prompt": "SELECT", "max_tokens": tokens, "ignore_eos": True}
        answer = self.router.post(
            "/v1/completions", body, {"x-hexgen-workflow-deadline-ms": "9000"}
        )
        good = answer.status == 200
        self.ended("answered" if good else answer.json["error"]["code"])

    def keep_making(self, tokens: int, enough: threading.Event) -> None:
        """Make one call after the other."""
        while not enough.is_set():
            self.make(tokens)

    def stream(self) -> str:
        """Read a long stream to its end; return the name of its engine."""
        data = json.dumps(LONG).encode()
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{self.router.url}/v1/completions", data, headers)
        with urllib.request.urlopen(request, timeout=200) as answer:
            engine = str(answer.headers["x-hexgen-engine"])
            lines = [line for line in answer if line.strip()]
        assert lines[-1].strip() == b"data: [DONE]"
        assert b'"finish_reason":"length"' in lines[-2].replace(b" ", b"")
        self.ended("answered")
        return engine

    def book(self) -> dict[str, Any]:
        """Return the router's book."""
        return dict(self.router.get("/ui/data").json["calls"])

    def check_ledger(self) -> None:
        """Check that the router's book says the same as ours, and has no call open."""
        wait_until(lambda: not self.book()["open"], self.router.program)  # it is half a second old
        book = self.book()
        assert book["received"] == book["answered"] + sum(book["failed"].values())
        assert {"answered": book["answered"], **book["failed"]} == dict(self.ends)


@contextmanager
def supervisor(path: Path, log: Path, address: str) -> Iterator[Spawned]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        words = ["--cluster", str(path), "--backend", "ray", "--ray-address", address]
        program = Spawned("hexgen_vllm.serve", words, log)
    try:
        yield program
    finally:
        program.stop()


class Scene(NamedTuple):
    """What the parts of the test share."""

    raylets: Raylets
    program: Spawned
    calls: Calls
    pool: ThreadPoolExecutor

    def until(self, true: Callable[[], bool]) -> None:
        """Wait until ``true()`` is."""
        wait_until(true, self.program)

    @contextmanager
    def busy(self, calls: int, tokens: int) -> Iterator[None]:
        """Keep a number of calls open all the time."""
        enough = threading.Event()
        makers = [self.pool.submit(self.calls.keep_making, tokens, enough) for _ in range(calls)]
        try:
            yield
        finally:
            enough.set()
        finish(makers)

    def started(self, name: str) -> str:
        """Return the beginning of the id of the node that an engine was started on last."""
        starts = re.findall(rf"engine {name}: starting on node (\w+)", self.program.text())
        return str(starts[-1])

    def states(self) -> dict[str, str]:
        """Return how the engines stand in the router."""
        workers = self.calls.router.get("/workers").json["workers"]
        return {worker["name"]: worker["state"] for worker in workers}

    def load(self, name: str) -> int:
        """Return the calls on an engine."""
        workers = self.calls.router.get("/workers").json["workers"]
        return next(int(worker["load"]) for worker in workers if worker["name"] == name)


def test_engines_are_placed_lost_added_and_taken_away(tiny_model: str, tmp_path: Path) -> None:
    port = free_port()
    path = cluster_file(tmp_path, tiny_model, port)
    with Raylets({"slow": 1}) as raylets, ThreadPoolExecutor(64) as pool:
        nodes = [raylets.add({"fast": 1}) for _ in range(2)]
        with supervisor(path, tmp_path / "log", raylets.address) as program:
            scene = Scene(raylets, program, Calls(Server(program, port)), pool)
            scene.until(lambda: "ready: " in program.text())
            assert scene.started("slow") == raylets.head[:8]
            lose_a_node(scene, nodes)
            take_one_away(scene, add_a_node(scene))
            pids = engine_pids(tmp_path)
            assert program.stop() == 0
        assert (len(pids["APIServer"]), len(pids["EngineCore"])) == (4, 4)
        assert not [pid for each in pids.values() for pid in each if is_alive(pid)]


def lose_a_node(scene: Scene, nodes: list[str]) -> None:
    """Kill a node while calls are open on its engine: traffic moves, and then the engine."""
    calls = scene.calls
    finish([scene.pool.submit(calls.make, 8) for _ in range(12)])
    [first] = [node for node in nodes if node.startswith(scene.started("fast-0"))]
    with scene.busy(8, 60):
        scene.until(lambda: scene.load("fast-0") > 0)
        scene.raylets.kill(first)
        scene.until(lambda: "engine fast-0: was lost" in scene.program.text())
    finish([scene.pool.submit(calls.make, 8) for _ in range(12)])
    calls.check_ledger()
    assert calls.ends["answered"] >= 24
    scene.until(lambda: scene.program.text().count("engine fast-0: healthy") == 2)
    scene.until(lambda: scene.states().get("fast-0") == "ready")  # taken out, and in again
    [other] = set(nodes) - {first}
    assert scene.started("fast-0") == other[:8]


def add_a_node(scene: Scene) -> list[Future[str]]:
    """Add a node and more work than two engines can do in time: a third one is started there.

    Returns streams that are open on all three; there is nothing else to do then.
    """
    added = scene.raylets.add({"fast": 1})
    with scene.busy(40, 50):
        scene.until(lambda: scene.states().get("fast-1") == "ready")
        scene.until(lambda: scene.load("fast-1") >= 10)  # as many as elsewhere
        streams = [scene.pool.submit(scene.calls.stream) for _ in range(9)]
    assert scene.started("fast-1") == added[:8]
    return streams


def take_one_away(scene: Scene, streams: list[Future[str]]) -> None:
    """See one engine leave, and not before its streams have ended."""
    scene.until(lambda: "leaves when its calls have ended" in scene.program.text())
    still_open = [stream for stream in streams if not stream.done()]
    leaving = re.findall(r"engine (\S+): leaves", scene.program.text())[-1]
    finish(streams)
    assert leaving in [stream.result() for stream in still_open]
    scene.until(lambda: f"engine {leaving}: gone" in scene.program.text())
    assert leaving not in scene.states()
    scene.calls.make(8)
    scene.calls.check_ledger()


def finish(calls: list[Future[Any]]) -> None:
    """Wait for all."""
    for call in calls:
        call.result()


def engine_pids(tmp_path: Path) -> dict[str, set[int]]:
    """Return the ids of all processes that were part of engines, by what they were."""
    found: dict[str, set[int]] = {}
    for path in (tmp_path / "logs").iterdir():
        text = path.read_text(errors="replace")
        for kind, pid in re.findall(r"(APIServer|EngineCore) pid=(\d+)", text):
            found.setdefault(kind, set()).add(int(pid))
    return found
