"""Files and batches of a router, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types import Batch
from yarl import URL

from hexgen_vllm.batches.store import Store, StoreLimits
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.testing.fake_server import FakeSettings
from hexgen_vllm.testing.stand import BODIES, CHAT, Stand, open_stand

ENDED = ("completed", "failed", "expired", "cancelled")


def line(name: str, url: str = CHAT, **more: Any) -> dict[str, Any]:
    body = {"model": "tiny", **BODIES[url], **more}
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def jsonl(*lines: Any) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in lines)


@asynccontextmanager
async def opened(folder: Path, *settings: FakeSettings, **options: Any) -> AsyncIterator[Stand]:
    async with open_stand(*settings, batch_dir=str(folder), **options) as stand:
        yield stand


def sdk(stand: Stand, key: str = "none") -> AsyncOpenAI:
    return AsyncOpenAI(base_url=stand.router.url + "/v1", api_key=key, max_retries=0)


async def created(client: AsyncOpenAI, content: bytes, endpoint: str = CHAT, **more: Any) -> Batch:
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    given: Any = {"completion_window": "24h", "input_file_id": file.id, **more}
    return await client.batches.create(endpoint=endpoint, **given)


async def ended(client: AsyncOpenAI, batch: Batch) -> Batch:
    while batch.status not in ENDED:
        await asyncio.sleep(0.01)
        batch = await client.batches.retrieve(batch.id)
    return batch


async def content(client: AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    found = await client.files.content(file_id)
    return [json.loads(one) for one in found.content.splitlines()]


async def test_every_request_of_a_file_is_answered_as_a_call_of_class_batch(tmp_path: Path) -> None:
    async with opened(tmp_path, FakeSettings(stats={})) as stand, sdk(stand) as client:
        lines = [line(f"r{i}", max_tokens=3, ignore_eos=True) for i in range(40)]
        batch = await created(client, jsonl(*lines), metadata={"job": "nightly"})
        assert batch.object == "batch"
        assert batch.expires_at is not None
        assert batch.expires_at - batch.created_at == 24 * 3600
        batch = await ended(client, batch)
        assert batch.status == "completed"
        assert batch.metadata == {"job": "nightly"}
        assert batch.request_counts is not None
        assert batch.request_counts.model_dump() == {"total": 40, "completed": 40, "failed": 0}
        assert batch.error_file_id is None
        assert None not in (batch.in_progress_at, batch.finalizing_at, batch.completed_at)
        found = await content(client, batch.output_file_id)
        assert [one["custom_id"] for one in found] == [f"r{i}" for i in range(40)]
        assert len({one["id"] for one in found}) == 40
        for one in found:
            assert one["error"] is None
            assert one["response"]["status_code"] == 200
            assert one["response"]["request_id"]
            assert one["response"]["body"]["usage"]["completion_tokens"] == 3
        for one in stand.received():
            if one.method == "POST":
                assert one.headers["x-hexgen-class"] == "batch"
                assert "x-hexgen-workflow-deadline-ms" not in one.headers
        stand.assert_settled()


async def test_files_can_be_listed_looked_at_read_and_deleted(tmp_path: Path) -> None:
    async with opened(tmp_path) as stand, sdk(stand) as client:
        texts = [b"a\r\nb", b"", b"--\r\n" * 1000]
        files = [await client.files.create(file=("n.jsonl", t), purpose="batch") for t in texts]
        for file, text in zip(files, texts, strict=True):
            assert (file.bytes, file.filename, file.purpose) == (len(text), "n.jsonl", "batch")
            assert await client.files.retrieve(file.id) == file
            assert (await client.files.content(file.id)).content == text
        assert [f.id async for f in await client.files.list()] == [f.id for f in files[::-1]]
        paged = await client.files.list(limit=2, order="asc")
        assert [f.id for f in paged.data] == [f.id for f in files[:2]]
        assert [f.id async for f in paged] == [f.id for f in files]
        assert (await client.files.delete(files[0].id)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(files[0].id)
        assert len(list((tmp_path / "files").iterdir())) == 2


WRONG: dict[str, tuple[bytes, str, str | None]] = {
    "no JSON": (b"{nope", "invalid_json_line", None),
    "no object": (b"[1]", "invalid_json_line", None),
    "no name": (jsonl({"method": "POST"}), "missing_required_parameter", "custom_id"),
    "name is no text": (jsonl({**line("x"), "custom_id": 5}), "invalid_type", "custom_id"),
    "empty name": (jsonl(line("")), "invalid_custom_id", "custom_id"),
    "twice": (jsonl(line("good")), "duplicate_custom_id", "custom_id"),
    "method": (jsonl({**line("x"), "method": "GET"}), "invalid_method", "method"),
    "no body": (jsonl({**line("x"), "body": None}), "invalid_type", "body"),
    "text as body": (jsonl({**line("x"), "body": "hi"}), "invalid_type", "body"),
    "other endpoint": (jsonl(line("x", "/v1/embeddings")), "invalid_url", "url"),
    "stream": (jsonl(line("x", stream=True)), "invalid_request", "body.stream"),
    "values": (
        b'{"custom_id":"x","method":"POST","url":"/v1/chat/completions","body":{"a":['
        + b"[],"[:2] * 0 + b",".join([b"[]"] * 200_000) + b"]}}",
        "invalid_request",
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
async def test_a_wrong_line_fails_the_batch_and_is_named(tmp_path: Path, name: str) -> None:
    text, code, param = WRONG[name]
    async with opened(tmp_path) as stand, sdk(stand) as client:
        batch = await created(client, jsonl(line("good")) + b"\n" + text)
        batch = await ended(client, batch)
        assert batch.status == "failed"
        assert batch.failed_at is not None
        assert batch.errors is not None
        assert batch.errors.data is not None
        (error,) = batch.errors.data
        assert (error.code, error.line, error.param) == (code, 3, param)
        assert error.message
        assert not [one for one in stand.received() if one.method == "POST"]


async def test_limits_of_a_batch(tmp_path: Path) -> None:
    async with opened(tmp_path, batch_max_requests=2) as stand, sdk(stand) as client:
        for text, code in (
            (b"\n \n", "empty_file"),
            (jsonl(*map(line, "abc")), "too_many_requests"),
        ):
            batch = await ended(client, await created(client, text))
            assert batch.status == "failed"
            assert batch.errors is not None
            assert [one.code for one in batch.errors.data or ()] == [code]
        wrong = await ended(client, await created(client, b"x\n" * 500))
        assert wrong.status == "failed"


@pytest.mark.parametrize(
    "path",
    ["/v1/files", "/v1/batches", "/workers", "/sleep", "/v1/models", "/shard/load", "/metrics",
     "/v1/load_lora_adapter", "/v1/chat/../../sleep", "/v1/chat/completions?a=b", "/%73leep",
     "/finish_session", "nonsense", "//x", "/v1/files/file-1/content"],
)  # fmt: skip
async def test_nothing_but_calls_can_be_had_by_batch(tmp_path: Path, path: str) -> None:
    async with opened(tmp_path, admin_api_key=("adm",)) as stand, sdk(stand) as client:
        with pytest.raises(openai.BadRequestError):
            await created(client, jsonl(line("a")), endpoint=path)
        text = jsonl({**line("a"), "url": path})
        batch = await ended(client, await created(client, text, endpoint="*"))
        assert batch.status == "failed"
        assert batch.errors is not None
        assert [one.code for one in batch.errors.data or ()] == ["invalid_url"]


async def test_a_file_of_vllm_run_batch_works_as_it_is(tmp_path: Path) -> None:
    """Its lines may be for several endpoints, and have fields that OpenAI does not know."""
    lines = [line(f"r{i}", url, extra=1) for i, url in enumerate(BODIES)]
    async with opened(tmp_path) as stand, sdk(stand) as client:
        batch = await ended(client, await created(client, b"\xef\xbb\xbf" + jsonl(*lines), "*"))
        assert batch.status == "completed"
        found = await content(client, batch.output_file_id)
        assert [one["custom_id"] for one in found] == [one["custom_id"] for one in lines]
        sent = [one for one in stand.received() if one.method == "POST"]
        assert {one.path for one in sent} == set(BODIES)
        for one in sent:
            assert json.loads(one.body) in [line["body"] for line in lines]


async def test_what_engines_refuse_is_in_the_error_file(tmp_path: Path) -> None:
    lines = [line("good"), line("bad", model="nobody"), line("fine")]
    async with opened(tmp_path) as stand, sdk(stand) as client:
        batch = await ended(client, await created(client, jsonl(*lines)))
        assert batch.status == "completed"
        assert batch.request_counts is not None
        assert batch.request_counts.model_dump() == {"total": 3, "completed": 2, "failed": 1}
        good = await content(client, batch.output_file_id)
        assert [one["custom_id"] for one in good] == ["good", "fine"]
        (bad,) = await content(client, batch.error_file_id)
        assert bad["custom_id"] == "bad"
        assert bad["response"]["status_code"] == 404
        assert bad["response"]["body"]["error"]["code"] == "model_not_found"


async def test_cancelled_batches_keep_what_was_answered(tmp_path: Path) -> None:
    slow = FakeSettings(step_s=0.05, slots=2)
    lines = [line("quick", max_tokens=1, ignore_eos=True)]
    lines += [line(f"r{i}", max_tokens=5000, ignore_eos=True) for i in range(20)]
    async with opened(tmp_path, slow) as stand, sdk(stand) as client:
        batch = await created(client, jsonl(*lines))
        while batch.request_counts is None or not batch.request_counts.completed:
            await asyncio.sleep(0.01)
            batch = await client.batches.retrieve(batch.id)
        with pytest.raises(openai.ConflictError):
            await client.files.delete(batch.input_file_id)
        assert (await client.batches.cancel(batch.id)).status == "cancelling"
        batch = await ended(client, batch)
        assert batch.status == "cancelled"
        assert None not in (batch.cancelling_at, batch.cancelled_at)
        (answer,) = await content(client, batch.output_file_id)
        assert answer["custom_id"] == "quick"
        left = await content(client, batch.error_file_id)
        assert [one["custom_id"] for one in left] == [f"r{i}" for i in range(20)]
        assert {one["error"]["code"] for one in left} == {"batch_cancelled"}
        await stand.until(lambda: stand.context.ledger.open == 0)
        stand.assert_settled()
        with pytest.raises(openai.ConflictError):
            await client.batches.cancel(batch.id)
        assert (await client.files.delete(batch.input_file_id)).deleted


async def test_a_batch_ends_with_its_window(tmp_path: Path) -> None:
    slow = FakeSettings(step_s=0.05, slots=2)
    async with opened(tmp_path, slow) as stand, sdk(stand) as client:
        lines = [line(f"r{i}", max_tokens=5000, ignore_eos=True) for i in range(4)]
        batch = await created(client, jsonl(*lines))
        while batch.status != "in_progress":
            await asyncio.sleep(0.01)
            batch = await client.batches.retrieve(batch.id)
    late(tmp_path, batch.id)
    async with opened(tmp_path, slow) as stand, sdk(stand) as client:
        batch = await ended(client, batch)
        assert batch.status == "expired"
        assert batch.expired_at is not None
        assert batch.output_file_id is None
        found = await content(client, batch.error_file_id)
        assert {one["error"]["code"] for one in found} == {"batch_expired"}
        assert len(found) == 4


def late(folder: Path, batch_id: str) -> None:
    """Have the window of a batch be over."""

    base = sqlite3.connect(folder / "batches.sqlite")
    (job,) = base.execute("SELECT job FROM batches WHERE id = ?", (batch_id,)).fetchone()
    kept = {**json.loads(job), "expires": 1.0}
    base.execute("UPDATE batches SET job = ? WHERE id = ?", (json.dumps(kept), batch_id))
    base.commit()
    base.close()


def told_anew(folder: Path, change: str) -> None:
    base = sqlite3.connect(folder / "batches.sqlite")
    with base:
        base.execute(change)
    base.close()


@pytest.mark.parametrize(
    ("change", "readable"),
    [
        ("UPDATE batches SET job = '{half'", False),
        ("UPDATE batches SET job = '[]'", False),
        ("UPDATE batches SET job = replace('' || hex(zeroblob(9000)), '00', '[')", False),
        ("UPDATE batches SET job = json_remove(job, '$.window')", False),
        ("UPDATE batches SET job = json_set(job, '$.expires', 'soon')", False),
        ("UPDATE batches SET job = json_set(job, '$.of_a_later_version', 1)", True),
        ("UPDATE batches SET job = json_remove(job, '$.times', '$.scoped')", True),
    ],
)
async def test_a_batch_of_another_version_or_broken_holds_up_no_other(
    tmp_path: Path, change: str, readable: bool
) -> None:
    async with opened(tmp_path) as stand, sdk(stand) as client:
        first = await ended(client, await created(client, jsonl(line("a"))))
    told_anew(tmp_path, change)
    told_anew(tmp_path, "UPDATE batches SET status = 'in_progress'")
    async with opened(tmp_path) as stand, sdk(stand) as client:
        second = await ended(client, await created(client, jsonl(line("b"))))
        assert second.status == "completed"
        found = [one.id for one in (await client.batches.list()).data]
        assert found == [second.id, *([first.id] if readable else [])]


async def test_a_folder_of_another_version_is_refused_at_the_start(tmp_path: Path) -> None:
    Store(StoreLimits(tmp_path)).close()
    told_anew(tmp_path, "ALTER TABLE batches DROP COLUMN cancelled")
    with pytest.raises(ConfigError, match=r"cannot be used: no such column"):
        Store(StoreLimits(tmp_path))


async def test_a_folder_that_fails_is_told_of_without_a_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path) as stand, sdk(stand) as client:
        batch = await ended(client, await created(client, jsonl(line("a"))))
        shutil.rmtree(tmp_path / "files")
        with pytest.raises(openai.InternalServerError) as failed:
            await client.files.create(file=("in.jsonl", b"{}"), purpose="batch")
        assert (failed.value.status_code, failed.value.code) == (503, "batch_folder_failed")
        told_anew(tmp_path, "DROP TABLE batches")
        for asked in (client.batches.list(), client.batches.retrieve(batch.id)):
            with pytest.raises(openai.InternalServerError) as failed:
                await asked
            assert failed.value.code == "batch_folder_failed"
        assert not any(record.exc_info for record in caplog.records)
        async with stand.post() as answer:
            assert answer.status == 200


@pytest.mark.parametrize("odd", ["%ff", "%ED%A0%80", "%00", "%F0%9F%98%80"])
async def test_ids_that_are_no_text_are_not_there(tmp_path: Path, odd: str) -> None:
    asked = (
        *(("GET", f"/v1/files/{odd}{more}") for more in ("", "/content")),
        ("DELETE", f"/v1/files/{odd}"),
        ("GET", f"/v1/batches/{odd}"),
        ("POST", f"/v1/batches/{odd}/cancel"),
    )
    async with opened(tmp_path) as stand:
        for method, path in asked:
            url = URL(stand.router.url + path, encoded=True)
            async with stand.client.request(method, url) as answer:
                assert answer.status == 404, path


async def test_batches_are_off_until_they_have_a_folder(stand: Stand) -> None:
    async with sdk(stand) as client:
        with pytest.raises(openai.NotFoundError) as caught:
            await client.files.create(file=("a", b"a" * 2**20), purpose="batch")
        assert caught.value.code == "batches_off"
        with pytest.raises(openai.NotFoundError):
            await client.batches.list()
