"""Files go to the disk as they come, within limits, and are their tenant's only."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from hexgen_vllm.batches import store
from hexgen_vllm.batches.form import FormReader
from hexgen_vllm.errors import BadRequest
from hexgen_vllm.router.http.server import Server
from hexgen_vllm.testing.fake_server import FakeSettings, Fault
from hexgen_vllm.testing.stand import CHAT, Stand
from tests.router.batches.test_batches import content, created, ended, jsonl, line, opened, sdk
from tests.router.test_loop_time import MOST_S, TRIES, Probe

MIB = 2**20


def server(stand: Stand) -> Server:
    runner = stand.router._runner
    assert runner is not None
    found = runner.server
    assert isinstance(found, Server)
    return found


async def upload(stand: Stand, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    named = {"Content-Type": "multipart/form-data; boundary=b", **headers}
    url = f"{stand.router.url}/v1/files"
    async with stand.client.post(url, data=body, headers=named) as answer:
        return answer.status, await answer.json()


def form(*files: bytes, purpose: bytes | None = b"batch", end: bytes = b"--b--\r\n") -> bytes:
    said = b'Content-Disposition: form-data; name="'
    parts = [
        b"--b\r\n" + said + b'file"; filename="a b.jsonl"\r\n\r\n' + f + b"\r\n" for f in files
    ]
    if purpose is not None:
        parts.append(b"--b\r\n" + said + b'purpose"\r\n\r\n' + purpose + b"\r\n")
    return b"".join(parts) + end


def send(port: int, pieces: list[bytes]) -> bytes:
    """Send a form from a thread of its own, and return the answer."""
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n"
            b"Content-Length: %d\r\n\r\n" % sum(map(len, pieces))
        )
        for one in pieces:
            client.sendall(one)
        return client.makefile("rb").read()


def read(port: int, file_id: str) -> str:
    """Read a file in a thread of its own, and return its digest."""
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(
            f"GET /v1/files/{file_id}/content HTTP/1.1\r\nHost: localhost\r\n"
            "Connection: close\r\n\r\n".encode()
        )
        got = client.makefile("rb")
        while got.readline().strip():
            pass
        found = hashlib.sha256()
        while data := got.read(MIB):
            found.update(data)
        return found.hexdigest()


async def test_a_large_file_is_never_in_memory_nor_holds_the_loop(tmp_path: Path) -> None:
    size = 96 * MIB
    piece = bytes(range(256)) * 1024
    head, tail = form(b"?").split(b"?")
    sent = [head, *[piece] * (size // len(piece)), tail]
    most, held = 0, 10.0
    async with opened(tmp_path) as stand:

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, server(stand).buffered.size)
                await asyncio.sleep(0)

        for _ in range(TRIES):
            probe = Probe()
            probe.look()
            watching = asyncio.create_task(watch())
            answer = await asyncio.to_thread(send, stand.router.port, sent)
            watching.cancel()
            file = json.loads(answer.partition(b"\r\n\r\n")[2])
            assert file["bytes"] == size
            digest = await asyncio.to_thread(read, stand.router.port, file["id"])
            probe.stop()
            assert digest == hashlib.sha256(piece * (size // len(piece))).hexdigest()
            held = min(held, probe.most_s)
            if held < MOST_S:
                break
    assert most < 4 * MIB
    assert held < MOST_S


BAD: dict[str, tuple[bytes, str, int, str]] = {
    "no file": (form(), "multipart/form-data; boundary=b", 400, "file"),
    "two files": (form(b"a", b"b"), "multipart/form-data; boundary=b", 400, "file"),
    "no purpose": (form(b"a", purpose=None), "multipart/form-data; boundary=b", 400, "purpose"),
    "bad purpose": (form(b"a", purpose=b"x"), "multipart/form-data; boundary=b", 400, "purpose"),
    "no end": (form(b"a", end=b""), "multipart/form-data; boundary=b", 400, ""),
    "no form": (b"{}", "application/json", 400, ""),
    "no boundary": (form(b"a"), "multipart/form-data", 400, ""),
    "other boundary": (form(b"a"), "multipart/form-data; boundary=c", 400, ""),
    "too long": (form(b"a" * 70_000), "multipart/form-data; boundary=b", 413, "file"),
    "too long for a form": (form(b"a" * MIB), "multipart/form-data; boundary=b", 413, ""),
    "long field": (form(b"", purpose=b"b" * 20_000), "multipart/form-data; boundary=b", 400,
                   "purpose"),
}  # fmt: skip


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("name", BAD)
async def test_bad_uploads_leave_nothing(tmp_path: Path, name: str, *, chunked: bool) -> None:
    body, kind, status, param = BAD[name]

    async def pieces() -> AsyncIterator[bytes]:
        for i in range(0, len(body), 4096):
            yield body[i : i + 4096]

    async with opened(tmp_path, batch_max_file_bytes=65536) as stand:
        sent: Any = pieces() if chunked else body
        try:
            found, said = await upload(stand, sent, **{"Content-Type": kind})
        except aiohttp.ClientError:  # it was told before it had sent all
            assert status == 413
        else:
            assert found == status
            if param:
                assert said["error"]["param"] == param
            assert said["error"]["message"]
        await stand.until(lambda: not list((tmp_path / "files").iterdir()))
        async with stand.get("/v1/files") as answer:
            assert (await answer.json())["data"] == []
        assert server(stand).buffered.size == 0
        async with stand.post() as answer:
            assert answer.status == 200


async def test_an_upload_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as stand:
        _, writer = await asyncio.open_connection("127.0.0.1", stand.router.port)
        writer.write(
            b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n" + form(b"a" * MIB, end=b"")
        )
        await writer.drain()
        await stand.until(lambda: list((tmp_path / "files").iterdir()))
        writer.transport.abort()
        await stand.until(lambda: not list((tmp_path / "files").iterdir()))


async def test_there_is_a_limit_for_all_and_for_each_tenant(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text("keys:\n" + "".join(f"  - {{key: sk-{t}, tenant: {t}}}\n" for t in "abc"))
    limits = {"batch_max_bytes": 500_000, "batch_max_tenant_bytes": 300_000}
    async with opened(tmp_path / "d", api_keys=str(keys), **limits) as stand:
        full = form(b"a" * 250_000)
        for key, status in (("a", 200), ("a", 413), ("b", 200), ("c", 413)):
            found, said = await upload(stand, full, Authorization=f"Bearer sk-{key}")
            assert found == status
            if status == 413:
                assert said["error"]["code"] == "storage_full"


async def test_files_and_batches_of_another_tenant_are_not_there(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(
        "keys:\n  - {key: sk-a, tenant: a}\n  - {key: sk-b, tenant: b}\n"
        "  - {key: sk-gate, tenant: gate, tenants: [a]}\n"
    )
    async with (
        opened(tmp_path / "d", api_keys=str(keys)) as stand,
        sdk(stand, "sk-a") as mine,
        sdk(stand, "sk-b") as other,
        sdk(stand, "sk-gate") as gate,
    ):
        batch = await ended(mine, await created(mine, jsonl(line("x"))))
        assert batch.status == "completed"
        assert batch.output_file_id is not None
        for file_id in (batch.input_file_id, batch.output_file_id):
            for ask in (other.files.retrieve, other.files.content, other.files.delete):
                with pytest.raises(openai.NotFoundError):
                    await ask(file_id)
        for look in (other.batches.retrieve, other.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                await look(batch.id)
        with pytest.raises(openai.NotFoundError):
            await other.batches.create(
                input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"
            )
        assert [one async for one in await other.files.list(after=batch.input_file_id)] == []
        assert [one async for one in await other.batches.list(after=batch.id)] == []
        named = {"x-hexgen-tenant": "a"}
        assert (await gate.batches.retrieve(batch.id, extra_headers=named)).id == batch.id
        with pytest.raises(openai.NotFoundError):
            await other.batches.retrieve(batch.id, extra_headers=named)
        with pytest.raises(openai.AuthenticationError):
            await sdk(stand, "sk-nobody").batches.retrieve(batch.id)
        assert [one async for one in await mine.batches.list()] == [batch]


async def test_calls_of_a_batch_are_its_tenants_within_its_ceiling(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text("keys:\n  - {key: sk-a, tenant: a, max-priority: system}\n")
    said = {"priority": -5, "vllm_xargs": {"hexgen_workflow_deadline_ms": 1, "hexgen_tenant": "b"}}
    options = {"api_keys": str(keys), "engine_api_key": "e"}
    async with (
        opened(tmp_path / "d", FakeSettings(stats={}), **options) as stand,
        sdk(stand, "sk-a") as client,
    ):
        batch = await ended(client, await created(client, jsonl(line("x", **said))))
        assert batch.request_counts is not None
        assert batch.request_counts.completed == 1
        (one,) = [one for one in stand.received() if one.method == "POST"]
        assert one.headers["x-hexgen-tenant"] == "a"
        assert one.headers["x-hexgen-class"] == "batch"
        assert one.headers["Authorization"] == "Bearer e"
        assert int(one.headers["x-vllm-priority"]) >= 1
        assert "x-hexgen-workflow-deadline-ms" not in one.headers


@pytest.mark.parametrize("status", [429, 503])
async def test_refusals_are_waited_out_and_failures_repeated_a_few_times(
    tmp_path: Path, status: int
) -> None:
    async with opened(tmp_path, disable_retries=True) as stand, sdk(stand) as client:
        fault = Fault("status", status=status, headers=(("Retry-After", "1"),))
        stand.engines[0].fault = fault
        batch = await created(client, jsonl(*(line(f"r{i}") for i in range(20))))
        await stand.until(lambda: stand.context.ledger.arrived.total() >= 2)
        await asyncio.sleep(0.5)
        assert stand.context.ledger.arrived.total() < 40, "nobody asks before Retry-After says"
        stand.engines[0].fault = None
        batch = await ended(client, batch)
        assert batch.request_counts is not None
        assert batch.request_counts.completed == 20


async def test_what_fails_again_and_again_is_told(tmp_path: Path) -> None:
    async with opened(tmp_path, disable_circuit_breaker=True) as stand, sdk(stand) as client:
        stand.engines[0].fault = Fault("status", status=500)
        batch = await created(client, jsonl(line("x")))
        batch = await ended(client, batch)
        (one,) = await content(client, batch.error_file_id)
        assert one["response"]["status_code"] == 502
        assert one["response"]["body"]["error"]["code"] == "engine-error"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
def test_a_form_can_come_in_pieces_of_any_size(size: int) -> None:
    file = b"\r\n--b\r\n-\r--bb\r\n--"[:-4].replace(b"\r\n--b", b"\r\n-b") + b"x" * 100 + b"\r\n--"
    whole = b"preamble\r\n" + form(file) + b"epilogue --b\r\n"
    reader = FormReader('multipart/form-data; boundary="b"')
    found = b""
    for i in range(0, len(whole), size):
        found += b"".join(reader.feed(whole[i : i + size]))
    assert reader.complete
    assert found == file
    assert reader.fields == {"purpose": "batch"}
    assert reader.filename == "a b.jsonl"


def test_a_form_without_end_takes_no_memory() -> None:
    reader = FormReader("multipart/form-data; boundary=b")
    reader.feed(b"--b\r\nX: ")
    with pytest.raises(BadRequest):
        reader.feed(b"y" * 100_000)


def test_a_line_has_one_answer(tmp_path: Path) -> None:
    one = store.Store(store.StoreLimits(tmp_path))
    batch = store.BatchJob(
        id="batch_1", owner="o", tenant="o", endpoint=CHAT, input_file="file-i", window="24h",
        created=1.0, expires=2.0, output_file="file-o", error_file="file-e",
    )  # fmt: skip
    one.add_batch(batch)
    one.add_answers([store.Answered("batch_1", 1, True, b"first\n")])
    one.add_answers([store.Answered("batch_1", 1, False, b"second\n")])
    found = one.batch("o", "batch_1")
    assert (found.completed, found.failed) == (1, 0)
    assert one.answered_lines("batch_1") == {1}
    for _ in one.finish(found, "completed"):
        pass
    assert one.path("file-o").read_bytes() == b"first\n"
    assert not one.path("file-e").exists()
    other = store.Store(store.StoreLimits(tmp_path))
    assert one.lead()
    assert not other.lead()
    one.close()
    assert other.lead()
    other.close()


def test_files_end_when_they_said_but_not_under_a_batch(tmp_path: Path) -> None:
    one = store.Store(store.StoreLimits(tmp_path, max_bytes=1000))
    files = []
    for _ in range(2):
        written = one.begin_upload()
        written.write_bytes(b"x")
        files.append(one.add_file(written, "o", "in", "batch", 1.0))
    one.add_batch(
        store.BatchJob(
            id="batch_1", owner="o", tenant="o", endpoint=CHAT, input_file=files[0].id,
            window="24h", created=1.0, expires=2.0, output_file="file-o", error_file="file-e",
        )
    )  # fmt: skip
    with pytest.raises(BadRequest):
        one.file("o", files[1].id)
    assert one.files("o", 10, None, None, newest_first=True) == ([], False)
    assert one.room("o") == 998
    one.sweep()
    assert one.path(files[0].id).exists(), "a batch reads it"
    assert one.room("o") == 999, "the other is gone"
    one.close()


def test_answers_are_written_bit_by_bit_and_their_room_is_given_back(tmp_path: Path) -> None:
    one = store.Store(store.StoreLimits(tmp_path, max_bytes=100 * MIB))
    batch = store.BatchJob(
        id="batch_1", owner="o", tenant="o", endpoint=CHAT, input_file="file-i", window="24h",
        created=1.0, expires=2.0, output_file="file-o", error_file="file-e",
    )  # fmt: skip
    one.add_batch(batch)
    record = b"x" * MIB + b"\n"
    one.add_answers([store.Answered("batch_1", i, True, record) for i in range(1, 41)])
    before = one.room("o")
    steps = sum(1 for _ in one.finish(batch, "completed"))
    assert steps > 10, "others got their turn"
    assert one.path("file-o").read_bytes() == record * 40
    assert one.room("o") == before, "what was an answer is output now"
    for _ in range(4):
        one.sweep()
    one.close()
    base = tmp_path / store.DATABASE
    assert base.stat().st_size < 20 * MIB
    assert base.stat().st_mode & 0o077 == 0
    assert (tmp_path / "files").stat().st_mode & 0o077 == 0
