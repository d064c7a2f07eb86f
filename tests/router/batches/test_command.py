"""``hexgen-vllm batch``: answers by one command, and one sentence for what is wrong."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hexgen_vllm import cli
from hexgen_vllm.testing.fake_server import FakeSettings
from hexgen_vllm.testing.stand import BODIES, Stand
from tests.router.batches.test_batches import jsonl, line, opened

Said = pytest.CaptureFixture[str]


async def command(stand: Stand | None, *words: object) -> int:
    url = [] if stand is None else ["--base-url", stand.router.url]

    def run() -> int:
        try:
            return cli.main(["batch", *map(str, words), *url])
        except SystemExit as left:
            return int(left.code or 0)

    return await asyncio.to_thread(run)


def names(path: Path) -> list[str]:
    return [json.loads(one)["custom_id"] for one in path.read_text().splitlines()]


async def test_a_file_is_answered_good_answers_first(tmp_path: Path, capsys: Said) -> None:
    source = tmp_path / "night.jsonl"
    lines = [line("bad", model="nobody"), *(line(url, url) for url in BODIES)]
    source.write_bytes(jsonl(*lines))
    async with opened(tmp_path / "d") as stand:
        assert await command(stand, "run", source) == 1
        assert names(tmp_path / "night.results.jsonl") == [*BODIES, "bad"]
        assert "5 of 6" in capsys.readouterr().err
        source.write_bytes(jsonl(*lines[1:]))
        out = tmp_path / "out.jsonl"
        assert await command(stand, "run", source, "--out", out) == 0
        assert names(out) == list(BODIES)
        assert await command(stand, "run", source, "--out", out) == 0
        capsys.readouterr()
        assert await command(stand, "status") == 0
        assert len(capsys.readouterr().out.splitlines()) == 3, "a new run is a new batch"
    assert {one.name for one in tmp_path.iterdir()} == {
        "d", "night.jsonl", "night.results.jsonl", "out.jsonl",
    }  # fmt: skip


async def test_an_interrupted_run_goes_on_with_its_batch(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(jsonl(*map(line, "abc")))
    digest_note = tmp_path / "out.jsonl.batch"
    async with opened(tmp_path / "d") as stand:
        assert await command(stand, "run", source, "--out", out) == 0
        token = (await seen(stand))[0]["metadata"]["hexgen_run"]
        about = await asyncio.to_thread(note_of, stand, source)
        digest_note.write_text(json.dumps({**about, "run": token}))
        out.unlink()
        assert await command(stand, "run", source, "--out", out) == 0
        assert names(out) == ["a", "b", "c"]
        assert len(await seen(stand)) == 1
        source.write_bytes(jsonl(*map(line, "abcd")))  # another file is another run
        digest_note.write_text(json.dumps({**about, "run": token}))
        assert await command(stand, "run", source, "--out", out) == 0
        assert names(out) == ["a", "b", "c", "d"]
        assert len(await seen(stand)) == 2


def note_of(stand: Stand, source: Path) -> dict[str, str]:

    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    return {"file": digest, "server": stand.router.url + "/v1"}


async def seen(stand: Stand) -> list[dict[str, Any]]:
    async with stand.get("/v1/batches") as answer:
        return list((await answer.json())["data"])


async def test_wrong_lines_are_named(tmp_path: Path, capsys: Said) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl(line("a"), line("a")) + b"nope\n")
    async with opened(tmp_path / "d") as stand:
        assert await command(stand, "run", source) == 2
    said = capsys.readouterr().err
    assert f"{source}:2: " in said
    assert f"{source}:3: " in said


async def test_a_batch_can_be_ended(tmp_path: Path, capsys: Said) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl(line("a", max_tokens=5000, ignore_eos=True)))
    async with opened(tmp_path / "d", FakeSettings(step_s=0.1)) as stand:
        running = asyncio.create_task(command(stand, "run", source))
        while not (found := await seen(stand)) or not stand.received():
            await asyncio.sleep(0.02)
        capsys.readouterr()
        assert await command(stand, "cancel", found[0]["id"]) == 0
        assert capsys.readouterr().out.split() == [found[0]["id"], "cancelling"]
        assert await running == 1
        assert await command(stand, "status", found[0]["id"]) == 0
        assert json.loads(capsys.readouterr().out)["status"] == "cancelled"
    (one,) = (tmp_path / "in.results.jsonl").read_text().splitlines()
    assert json.loads(one)["error"]["code"] == "batch_cancelled"


WRONG: dict[str, Callable[[Path], list[object]]] = {
    "no such file": lambda at: ["run", at / "nope.jsonl"],
    "a folder": lambda at: ["run", at],
    "empty": lambda at: ["run", at / "empty.jsonl"],
    "no window": lambda at: ["run", at / "one.jsonl", "--window", "soon"],
    "no place for output": lambda at: ["run", at / "one.jsonl", "--out", at / "no" / "out"],
    "no such batch": lambda at: ["status", "batch_nope"],
    "no batch to cancel": lambda at: ["cancel", "batch_nope"],
    "odd id": lambda at: ["status", "a/b?c"],
}


@pytest.mark.parametrize("name", WRONG)
async def test_mistakes_get_one_sentence(tmp_path: Path, capsys: Said, name: str) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"\n\n")
    (tmp_path / "one.jsonl").write_bytes(jsonl(line("a")))
    async with opened(tmp_path / "d") as stand:
        assert await command(stand, *WRONG[name](tmp_path)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("hexgen-vllm batch ")
    assert said.endswith(".") or "nope" in said or "a/b" in said


@pytest.mark.parametrize("url", ["nonsense", "http://127.0.0.1:1", "http://127.0.0.1:x/v1"])
async def test_a_server_that_is_not_there_is_said_so(
    tmp_path: Path, capsys: Said, url: str
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl(line("a")))
    assert await command(None, "run", source, "--base-url", url) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


async def test_a_router_without_folder_says_what_to_do(
    stand: Stand, tmp_path: Path, capsys: Said
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl(line("a")))
    assert await command(stand, "run", source) == 2
    assert "--batch-dir" in capsys.readouterr().err
