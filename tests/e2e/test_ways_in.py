"""The three ways to run urgency scheduling, each with a real engine and over real HTTP.

a. ``python -m hexgen_vllm.serve``, a drop-in for ``vllm serve``;
b. vLLM's own command with vLLM's own flags, or with the flags that the plugin adds;
c. ``vllm.LLM`` in Python.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.forkserver import ForkServer
from tests.e2e.programs import Server, Spawned, free_port, small_engine

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

SERVE = "hexgen_vllm.serve"
VLLM = "vllm.entrypoints.cli.main"
SMALL = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # on a CPU: one process less
PROMPT = {"model": "tiny", "prompt": "SELECT name FROM", "max_tokens": 4}
HOUR_MS = 3_600_000
HEADERS = {"x-hexgen-workflow-id": "w1", "x-hexgen-workflow-deadline-ms": str(HOUR_MS)}


TRIES = 20


def stats_of_one(server: Server, body: Any, headers: Mapping[str, str] | None = None) -> Any:
    """Return the engine's stats while one call is under way, and nothing else."""
    for _ in range(TRIES):  # it may end before a busy machine asks, or the last one still be there
        with server.in_flight(body, headers):
            stats = server.get("/hexgen/stats").json
        if stats["running"] == 1:
            return stats
    raise AssertionError(stats)


def check_everything(server: Server) -> None:
    """Check all that a client can see of urgency scheduling."""
    in_body = {**PROMPT, "vllm_xargs": {"hexgen_workflow_deadline_ms": HOUR_MS}}
    without = PROMPT  # it has all the slack there is
    for body, headers in ((PROMPT, HEADERS), (in_body, None), (without, None)):
        stats = stats_of_one(server, body, headers)
        assert (stats["waiting"], stats["slack_counts"][-1]) == (0, 1), "more than the last bucket"
    check_bad_input(server)
    metrics = server.get("/metrics").text
    assert "\nhexgen_vllm_steps_total " in metrics
    assert "\nvllm:num_requests_running{" in metrics
    assert "\nhexgen_vllm_bad_metadata_total 0\n" in metrics


def check_bad_input(server: Server) -> None:
    """Check that what cannot be read is refused with an OpenAI error object naming the field."""
    bad = server.post("/v1/completions", PROMPT, {"x-hexgen-workflow-deadline-ms": "soon"})
    assert (bad.status, bad.json["error"]["param"]) == (400, "x-hexgen-workflow-deadline-ms")
    chat = {"model": "tiny", "messages": [], "vllm_xargs": {"hexgen_stage": "a b"}}
    bad = server.post("/v1/chat/completions", chat)
    assert (bad.status, bad.json["error"]["param"]) == (400, "hexgen_stage")
    bad = server.post("/v1/completions", b'{"model": "ti', HEADERS)
    assert (bad.status, "error" in bad.json) == (400, True)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def test_the_drop_in_does_all_that_vllm_serve_does(
    tiny_model: str, tmp_path: Path, log: Path
) -> None:
    """Way a, started as users start it: new interpreters, a YAML file, a signal at the end."""
    port = free_port()
    words = [word.removeprefix("--").partition("=") for word in small_engine(port)]
    config: dict[str, Any] = {name: value or True for name, _, value in words}
    config |= {"hexgen-order": "edf", "hexgen-displace": False}
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    server = Server(Spawned(SERVE, [tiny_model, "--config", str(path)], log), port)
    try:
        server.wait_healthy()
        assert server.get("/hexgen/stats").json["order"] == "edf"
        check_everything(server)
        body = {**PROMPT, "stream": True, "messages": [{"role": "user", "content": "x"}]}
        stream = server.post("/v1/chat/completions", body, HEADERS).text
        assert stream.endswith("data: [DONE]\n\n")
    finally:
        code = server.program.stop()
    assert code == 0
    assert "'hexgen': {'order': 'edf', 'displace': False}" in server.program.text()


@pytest.fixture(scope="module")
def stock(forks: ForkServer, tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Yield a plain vLLM in an environment where our plugin is installed."""
    port = free_port()
    argv = ["serve", tiny_model, *small_engine(port)]
    program = forks.start(VLLM, argv, tmp_path_factory.mktemp("stock") / "log", SMALL)
    yield Server(program, port).wait_healthy()
    program.stop()


def test_vllm_with_its_own_flags(forks: ForkServer, tiny_model: str, log: Path) -> None:
    """Way b, without a flag of ours."""
    port = free_port()
    options = json.dumps({"hexgen": {"order": "paper"}})
    ours = ["--scheduler-cls=hexgen_vllm.UrgencyScheduler", f"--additional-config={options}"]
    program = forks.start(VLLM, ["serve", tiny_model, *ours, *small_engine(port)], log, SMALL)
    server = Server(program, port).wait_healthy()
    assert server.get("/hexgen/stats").json["order"] == "paper"
    check_everything(server)
    assert program.stop() == 0


def test_vllm_with_the_plugins_flags(forks: ForkServer, tiny_model: str, log: Path) -> None:
    """Way b, with the flags that the installed plugin adds."""
    port = free_port()
    ours = ["--scheduling-policy=urgency", "--hexgen-order", "edf"]
    program = forks.start(VLLM, ["serve", tiny_model, *ours, *small_engine(port)], log, SMALL)
    server = Server(program, port).wait_healthy()
    assert server.get("/hexgen/stats").json["order"] == "edf"
    check_everything(server)
    assert program.stop() == 0


def test_a_vllm_that_does_not_ask_for_us_is_plain(stock: Server) -> None:
    assert stock.get("/hexgen/stats").status == 404
    assert "hexgen_vllm_" not in stock.get("/metrics").text
    answer = stock.post("/v1/completions", PROMPT, {"x-hexgen-nonsense": "1"})
    assert answer.status == 200
    assert len(answer.json["choices"]) == 1


@pytest.mark.parametrize("module", [SERVE, VLLM])
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--hexgen-default-deadline-s=-1"], "vllm serve: default_deadline_s must be at least 0"),
        (["--hexgen-ordr=edf"], "vllm serve: unknown option --hexgen-ordr; known are --hexgen-"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_exit_code_2(
    forks: ForkServer, log: Path, module: str, words: list[str], sentence: str
) -> None:
    first = [] if module == SERVE else ["serve"]
    program = forks.start(module, [*first, "m", "--scheduling-policy=urgency", *words], log)
    assert program.wait() == 2
    said = [line for line in program.text().splitlines() if "hexgen" in line or "vllm s" in line]
    assert len(said) == 1
    assert said[0].startswith(sentence)


def test_the_help_has_both_groups(forks: ForkServer, log: Path) -> None:
    program = forks.start(SERVE, ["--help=all"], log)
    assert program.wait() == 0
    text = program.text()
    assert "\nSchedulerConfig:\n" in text
    assert "\nhexgen:\n" in text
    assert "--hexgen-default-deadline-s" in text
    assert "--cluster FILE" in text
    assert "{fcfs,priority,urgency}" in text


@pytest.mark.parametrize(
    ("words", "order", "env"),
    [
        (["class"], "due", {}),
        (["policy"], "due", SMALL),
        (["class", "order=edf"], "edf", SMALL),
    ],
)
def test_an_llm_in_python_runs_the_most_urgent_first(
    forks: ForkServer,
    tiny_model: str,
    log: Path,
    words: list[str],
    order: str,
    env: dict[str, str],
) -> None:
    """Way c, with the engine in a process of its own and in the program's."""
    program = forks.start("tests.e2e.in_python", [tiny_model, *words], log, env)
    assert program.wait() == 0, program.text()
    [result] = [line for line in program.text().splitlines() if line.startswith('{"ended"')]
    # The first one has no deadline: it gives way to those that have one.
    assert json.loads(result) == {"ended": ["3000", "30000", "90000", "first"], "order": order}


def test_an_llm_in_python_with_a_wrong_option_is_an_error_that_names_it(
    forks: ForkServer, tiny_model: str, log: Path
) -> None:
    program = forks.start("tests.e2e.in_python", [tiny_model, "class", "ordr=edf"], log)
    assert program.wait() == 1
    assert "ConfigError: unknown hexgen option 'ordr'; known are " in program.text()
