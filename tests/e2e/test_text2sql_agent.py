"""The text-to-SQL agent on a real engine behind the real router, held to its grammars."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.text2sql.databases import build_all
from examples.text2sql.main import main
from examples.text2sql.options import MODEL
from hexgen_vllm.text2sql import agent, candidates
from hexgen_vllm.text2sql.grammar import ROOT, Grammar, words
from hexgen_vllm.text2sql.schema import Schema
from tests.e2e.forkserver import ForkServer
from tests.e2e.programs import Server, Spawned, free_port, small_engine

FREE, HELD = 31, 26
"""Right answers of the trained model, of 48: some fewer than docs/text2sql.md says."""
WRITES = ("DELETE FROM loan", "SELECT 1; DROP TABLE loan", "UPDATE loan SET id = 0")

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def router(
    forks: ForkServer, tiny_model: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Yield a router before one engine."""
    logs, port = tmp_path_factory.mktemp("logs"), free_port()
    argv = [word for word in small_engine(port) if not word.startswith("--max-model-len")]
    argv = [tiny_model, *argv, "--max-model-len=2048"]
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    engine = Server(forks.start("hexgen_vllm.serve", argv, logs / "engine", alone), port)
    engine.wait_healthy()
    argv = [f"--port={free_port()}", "--worker-urls", engine.url]
    program = Spawned("hexgen_vllm.router", argv, logs / "router")
    yield Server(program, int(argv[0].partition("=")[2])).wait_healthy()
    program.stop()
    engine.program.stop()


def test_random_weights_held_to_grammars_give_sql_that_runs(router: Server, tmp_path: Path) -> None:
    argv = ["--constrain", "--temperature=1", "--users=6", "--rate=20", "--max-rounds=2"]
    argv.append("--same-effort")
    where = [f"--base-url={router.url}/v1", f"--out={tmp_path}", "--max-tokens=600"]
    assert main([*where, *argv]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["questions"], found["failed"], found["on_time"]) == (6, 0, 6)
    assert found["completed"] + found["refused"] == 6, "a result may be too large"
    assert found["calls"] >= 6 * 4
    assert found["output_tokens"] > 6 * 100
    for answer in found["answers"]:
        sql, error = answer["sql"], answer["error"] or ""
        assert sql.startswith("SELECT "), answer
        assert answer["row_count"] is not None or error.startswith("refused: the result"), answer
        assert answer["stages"]["generate_candidate"] == 2
    metrics = router.get("/metrics").text.splitlines()
    assert "hexgen_router_open_workflows 0.0" in metrics, "the agent tells that a question ended"
    counted = [line for line in metrics if line.startswith("hexgen_router_workflows_total")]
    ended = [line for line in counted if not line.endswith(" 0.0")]
    assert len(ended) == 1
    assert ended[0].endswith(" 6.0")
    assert 'type="text2sql"' in ended[0]
    assert 'outcome="on-time"' in ended[0]


def test_a_model_that_writes_is_refused_and_disturbs_nobody(
    router: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = candidates.query_grammar

    def grammar(schema: Schema) -> Grammar:
        """Let the model write only what deletes, in the library."""
        if "loan" not in schema.names():
            return held(schema)
        return Grammar({ROOT: words(f"```sql\n{sql}\n```" for sql in WRITES)})

    monkeypatch.setattr(candidates, "query_grammar", grammar)
    monkeypatch.setattr(agent, "_linked_schema", whole_schema)
    argv = ["--constrain", "--temperature=1", "--users=6", "--rate=20", "--max-rounds=1"]
    assert main([f"--base-url={router.url}/v1", f"--out={tmp_path}", *argv]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["failed"] == 0
    answers = {one["id"]: one for one in found["answers"]}
    written = {name: one for name, one in answers.items() if one["sql"] in WRITES}
    assert set(written) == {name for name in answers if name.startswith("library")}
    assert 0 < len(written) < 6, "others ask at the same time"
    assert found["refused"] >= len(written)
    assert found["completed"] <= 6 - len(written)
    for one in written.values():
        assert one["rows"] is None
        assert one["error"].startswith("refused: ")
    for name, path in build_all(tmp_path / "new").items():
        assert (tmp_path / f"databases/{name}.sqlite").read_bytes() == path.read_bytes()


async def whole_schema(_: object, __: object, schema: Schema, ___: str) -> Schema:
    return schema


@pytest.fixture(scope="module")
def trained(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield an engine that serves the model that the project has trained."""
    logs, port = tmp_path_factory.mktemp("logs"), free_port()
    fixed = ("--max-model-len", "--num-gpu-blocks-override")
    argv = [word for word in small_engine(port) if not word.startswith(fixed)]
    argv = [str(MODEL), *argv, "--max-model-len=2048", "--num-gpu-blocks-override=1024"]
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    engine = Server(forks.start("hexgen_vllm.serve", argv, logs / "engine", alone), port)
    yield engine.wait_healthy()
    engine.program.stop()


@pytest.mark.parametrize(("words", "least"), [([], FREE), (["--constrain"], HELD)])
def test_the_trained_model_answers_questions_that_it_was_not_trained_on(
    trained: Server, tmp_path: Path, words: list[str], least: int
) -> None:
    where = [f"--base-url={trained.url}/v1", f"--out={tmp_path}", "--rate=50", "--deadline-s=170"]
    assert main([*where, "--max-rounds=1", "--max-tokens=160", "--same-effort", *words]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["questions"], found["failed"]) == (48, 0)
    assert found["execution_match"] >= least
    lengths = {answer["output_tokens"] for answer in found["answers"]}
    assert len(lengths) > 10, "answers end by themselves"


def test_a_grammar_that_cannot_be_read_fails_one_call_only(router: Server) -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "SELECT"}],
        "max_tokens": 8,
        "structured_outputs": {"grammar": "root ::= nowhere"},
    }
    assert router.post("/v1/chat/completions", body).status == 400
    body["structured_outputs"] = {"grammar": 'root ::= "SELECT 1"'}
    answer = router.post("/v1/chat/completions", body)
    assert answer.json["choices"][0]["message"]["content"] == "SELECT 1"
