"""``--backend ray`` as a program: what it says when it cannot work, and one life of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import urllib.request
from pathlib import Path
from types import ModuleType

import pytest

from hexgen_vllm import serve
from tests.cluster.fakes import is_alive
from tests.cluster.ray.raylets import ENVIRONMENT
from tests.e2e.programs import Spawned, free_port, wait_until

FAKE = [sys.executable, "-m", "hexgen_vllm.testing.fake_server", "--port", "{port}"]


def cluster_file(tmp_path: Path, first: str, *, router: str = "false") -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        f"defaults: {{ray: {{num_cpus: 0}}}}\n"
        f"engines:\n"
        f"  - {{name: first, command: {json.dumps(FAKE)}, ray: {{{first}}}}}\n"
        f"  - {{name: second, command: {json.dumps(FAKE)}}}\n"
        f"router: {router}\n"
        f"log_dir: {tmp_path / 'logs'}\n"
        f"ray: {{local_resources: {{CPU: 1, GPU: 2, 'accelerator_type:A100': 1, fast: 1}}}}\n"
    )
    return path


@pytest.fixture
def quiet_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give programs the environment of a Ray that keeps to itself."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def complaint(tmp_path: Path, *words: str, first: str = "") -> str:
    """Return the one sentence with which the program refuses to start."""
    path = cluster_file(tmp_path, first)
    program = Spawned("hexgen_vllm.serve", ["--cluster", str(path), *words], tmp_path / "log")
    assert program.wait() == 2
    return program.text().strip()


@pytest.mark.parametrize("found", [None, ModuleType("ray")], ids=["nothing", "a folder"])
def test_without_ray_installed_it_says_what_to_install(
    found: ModuleType | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setitem(sys.modules, "ray", found)
    path = cluster_file(tmp_path, "")
    assert serve.main(["--cluster", str(path), "--backend=ray"]) == 2
    assert capsys.readouterr().err == (
        "python -m hexgen_vllm.serve: backend ray needs Ray, which is not installed: "
        "pip install 'hexgen-vllm[ray]'.\n"
    )


@pytest.mark.usefixtures("quiet_ray")
@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1: connection refused."),
        ("ray://127.0.0.1:1", "ray address must be host:port or auto, not 'ray://127.0.0.1:1'; "),
    ],
)
def test_a_cluster_that_is_not_there_is_one_sentence(
    tmp_path: Path, address: str, sentence: str
) -> None:
    said = complaint(tmp_path, "--backend=ray", f"--ray-address={address}")
    assert said.startswith(f"python -m hexgen_vllm.serve: {sentence}")
    assert "\n" not in said


def test_an_address_goes_with_ray_only(tmp_path: Path) -> None:
    said = complaint(tmp_path, "--ray-address=auto")
    assert said.endswith("argument --ray-address: goes with --backend ray only.")


@pytest.mark.slow
@pytest.mark.usefixtures("quiet_ray")
def test_a_resource_that_no_node_has_is_one_sentence(tmp_path: Path) -> None:
    said = complaint(tmp_path, "--backend=ray", first="accelerator_type: H100")
    assert said == (
        "python -m hexgen_vllm.serve: engine first cannot be placed: no node of the Ray cluster "
        "has 1 GPU and accelerator H100; there are nodes with 1 CPU and 2 GPU and accelerator A100 "
        "and 1 fast."
    )


@pytest.mark.slow
@pytest.mark.usefixtures("quiet_ray")
def test_what_dies_is_started_again_and_nothing_is_left_behind(tmp_path: Path) -> None:
    port = free_port()
    first = "accelerator_type: A100, resources: {fast: 1}"
    path = cluster_file(tmp_path, first, router=f"{{port: {port}}}")
    words = ["--cluster", str(path), "--backend=ray"]
    program = Spawned("hexgen_vllm.serve", words, tmp_path / "log")
    try:
        wait_until(lambda: "ready: " in program.text(), program)
        assert states(port) == {"first": "ready", "second": "ready"}
        engines = pids("fake_server", program)
        assert sorted(map(devices, engines)) == ["", "0"], "one has a GPU, and the other none"
        engine = engines[0]
        os.kill(engine, signal.SIGKILL)
        wait_until(lambda: program.text().count("healthy at") == 3, program)
        wait_until(lambda: set(states(port).values()) == {"ready"}, program)
        [router] = pids("hexgen_vllm.router", program)
        os.kill(router, signal.SIGKILL)
        wait_until(lambda: program.text().count("router: up") == 2, program)
        wait_until(lambda: states(port) == {"first": "ready", "second": "ready"}, program)
        left = [*pids("fake_server", program), *pids("hexgen_vllm.router", program)]
        left += pids("raylet", program)
    finally:
        code = program.stop()
    assert code == 0
    assert len(left) >= 4
    assert not any(map(is_alive, left))


def devices(pid: int) -> str:
    """Return the GPUs that a process may use."""
    words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return next((w.partition("=")[2] for w in words if w.startswith("CUDA_VISIBLE_")), "")


def states(port: int) -> dict[str, str]:
    """Return how the engines stand in the router, if it answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/workers", timeout=60) as answer:
            workers = json.load(answer)["workers"]
    except OSError:
        return {}
    return {worker["name"]: worker["state"] for worker in workers}


def pids(word: str, program: Spawned) -> list[int]:
    """Return the processes below ``program`` whose command line has ``word``."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            found = re.match(r"(\d+) \(.*\) \S (\d+)", stat.read_text(), re.DOTALL)
            assert found
            children.setdefault(int(found[2]), []).append(int(found[1]))
    named, below = [], [program.pid]
    while below:
        below += children.get(pid := below.pop(), [])
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        if word in command and "child.py" not in command:
            named.append(pid)
    return named
