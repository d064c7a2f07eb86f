"""Answers ``/v1/files`` and ``/v1/batches`` as OpenAI does; knows no HTTP server."""

from __future__ import annotations

import logging
import math
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from hexgen_vllm.batches.form import FormReader
from hexgen_vllm.batches.lines import ANY_ENDPOINT, Serves, servable
from hexgen_vllm.batches.store import BatchJob, Disk, File, new_id, not_there
from hexgen_vllm.clock import unix_s
from hexgen_vllm.errors import BadRequest

_LOG = logging.getLogger(__name__)
FILES: Final = "/v1/files"
BATCHES: Final = "/v1/batches"
MAX_BODY_BYTES: Final = 64 * 1024
"""Longest body of a request that is no upload."""

FORM_BYTES: Final = 128 * 1024
"""What a form may have around its file."""

WINDOW: Final = "24h"
_WINDOWS: Final = {"m": 60.0, "h": 3600.0, "d": 86400.0}
_MAX_WINDOW_S: Final = 14 * 86400.0
_PURPOSES: Final = ("batch", "batch_output", "user_data", "assistants", "fine-tune", "vision",
                    "evals")  # fmt: skip
_MIN_KEEP_S: Final = 3600
_MAX_KEEP_S: Final = 30 * 86400
_MAX_METADATA: Final = 16
_MAX_PAGE: Final = {"files": 10_000, "batches": 100}
_PAGE: Final = {"files": 10_000, "batches": 20}


class BatchClient(NamedTuple):
    """Who asks.

    Attributes:
        owner: whose files and batches can be seen.
        tenant: whose the calls of a batch are.
        scoped: ids of their workflows belong to the tenant.
        max_priority: the most that they can claim.
    """

    owner: str
    tenant: str
    scoped: bool = False
    max_priority: int = 0


@dataclass(frozen=True, slots=True)
class Asked:
    """A request.

    Attributes:
        method: of it.
        path: of it, one of ours.
        query: decoded.
        headers: by lower-case name.
        owner: who asks.
        pieces: the body as it arrives.
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    owner: BatchClient
    pieces: AsyncIterator[bytes]


@dataclass(frozen=True, slots=True)
class ApiReply:
    """An answer: JSON, or a file.

    Attributes:
        content: to be written as JSON.
        path: of the file, ``None`` for JSON.
        size: of the file, bytes.
    """

    content: Any = None
    path: Path | None = None
    size: int = 0


class BatchApi:
    """The endpoints.

    Args:
        disk: with the store.
        serves: whether a path takes batches.
        wake: is called when a batch has come or shall end.
    """

    def __init__(self, disk: Disk, serves: Serves, wake: Callable[[], None]) -> None:
        self._disk, self._serves, self._wake = disk, serves, wake
        self._uploading = 0  # bytes that are on their way to the disk

    async def answer(self, asked: Asked) -> ApiReply:
        """Answer a request.

        Raises:
            BadRequest: it is wrong, or what it is about is not there.
        """
        rest, files = asked.path.removeprefix(FILES), asked.path.startswith(FILES)
        if not files:
            rest = asked.path.removeprefix(BATCHES)
        one_id, _, more = rest.removeprefix("/").partition("/")
        asks = (asked.method if asked.method != "HEAD" else "GET", bool(one_id), more)
        found = (_FILES if files else _BATCHES).get(asks)
        if found is None:
            raise BadRequest("There is no such endpoint.", status=404)
        if not one_id.isascii():  # it may hold bytes that are no text, which a database refuses
            raise not_there("File" if files else "Batch", one_id)
        try:
            return await found(self, asked, one_id)
        except ConnectionError:
            raise
        except (OSError, sqlite3.Error) as error:
            _LOG.error("the folder of batches failed error=%s", error)
            text = "The router cannot use its folder of files and batches now."
            raise BadRequest(text, status=503, code="batch_folder_failed") from None

    # Files

    async def _upload(self, asked: Asked, _: str) -> ApiReply:
        if asked.headers.get("content-encoding", "identity").lower() != "identity":
            raise BadRequest("A file must be sent as it is, not compressed.", status=415)
        form = FormReader(asked.headers.get("content-type", ""))
        store = self._disk.store
        most = store.limits.max_file_bytes
        length = asked.headers.get("content-length", "")
        comes = int(length) if length.isdecimal() else most
        if comes > most + FORM_BYTES:
            raise _too_large(most)
        room = await self._disk.do(store.room, asked.owner.owner) - self._uploading
        if room <= 0 or (length and comes > room + FORM_BYTES):
            raise _full()
        written, size = store.begin_upload(), 0
        file = await self._disk.with_file(written.open, "xb")
        self._uploading += comes
        try:
            async for piece in asked.pieces:
                data = b"".join(form.feed(piece))
                size += len(data)
                if size > most:
                    raise _too_large(most)
                if size > room:
                    raise _full()
                if data:
                    await self._disk.with_file(file.write, data)
            purpose, expires = _described(form)
            await self._disk.with_file(file.close)
            add, name = store.add_file, form.filename or "file"
            one = await self._disk.do(add, written, asked.owner.owner, name, purpose, expires)
            return ApiReply(one.told())
        except OSError as error:
            if isinstance(error, ConnectionError):
                raise
            raise _full() from None
        finally:
            self._uploading -= comes
            await self._disk.with_file(_discard, file, written)

    async def _list_files(self, asked: Asked, _: str) -> ApiReply:
        query, store = asked.query, self._disk.store
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise BadRequest("order must be asc or desc.", param="order")
        limit, after = _limit(query, "files"), query.get("after")

        def read() -> tuple[list[File], bool]:
            return store.files(
                asked.owner.owner, limit, after, query.get("purpose"), newest_first=order == "desc"
            )

        found, more = await self._disk.do(read)
        return ApiReply(_listed([one.told() for one in found], more=more))

    async def _file(self, asked: Asked, file_id: str) -> ApiReply:
        found = await self._disk.do(self._disk.store.file, asked.owner.owner, file_id)
        return ApiReply(found.told())

    async def _content(self, asked: Asked, file_id: str) -> ApiReply:
        found = await self._disk.do(self._disk.store.file, asked.owner.owner, file_id)
        path = self._disk.store.path(found.id)
        return ApiReply(path=path, size=found.bytes)

    async def _delete(self, asked: Asked, file_id: str) -> ApiReply:
        await self._disk.do(self._disk.store.delete_file, asked.owner.owner, file_id)
        return ApiReply({"id": file_id, "object": "file", "deleted": True})

    # Batches

    async def _create(self, asked: Asked, _: str) -> ApiReply:
        body, owner, store = await _object(asked), asked.owner, self._disk.store
        endpoint = _text(body, "endpoint")
        if endpoint != ANY_ENDPOINT and not servable(endpoint, self._serves):
            raise BadRequest(f"{endpoint!r} takes no batches.", param="endpoint")
        window = _text(body, "completion_window")
        window_s = _window_s(window)
        file = await self._disk.do(_input, store.file, owner.owner, _text(body, "input_file_id"))
        if file.purpose != "batch":
            text = f"The purpose of file {file.id} must be 'batch', not '{file.purpose}'."
            raise BadRequest(text, param="input_file_id")
        now = unix_s()
        batch = BatchJob(
            id=new_id("batch_"),
            owner=owner.owner,
            tenant=owner.tenant,
            scoped=owner.scoped,
            max_priority=owner.max_priority,
            endpoint=endpoint,
            input_file=file.id,
            window=window,
            created=now,
            expires=now + window_s,
            output_file=new_id("file-"),
            error_file=new_id("file-"),
            metadata=_metadata(body.get("metadata")),
            output_expires=_kept_s(body.get("output_expires_after"), "output_expires_after"),
        )
        await self._disk.do(store.add_batch, batch)
        self._wake()
        return ApiReply(batch.told())

    async def _list_batches(self, asked: Asked, _: str) -> ApiReply:
        limit, after = _limit(asked.query, "batches"), asked.query.get("after")
        owner, store = asked.owner.owner, self._disk.store
        found, more = await self._disk.do(store.batches, owner, limit, after)
        return ApiReply(_listed([one.told() for one in found], more=more))

    async def _batch(self, asked: Asked, batch_id: str) -> ApiReply:
        found = await self._disk.do(self._disk.store.batch, asked.owner.owner, batch_id)
        return ApiReply(found.told())

    async def _cancel(self, asked: Asked, batch_id: str) -> ApiReply:
        found = await self._disk.do(self._disk.store.cancel, asked.owner.owner, batch_id)
        self._wake()
        return ApiReply(found.told())


_FILES: Final = {
    ("POST", False, ""): BatchApi._upload,
    ("GET", False, ""): BatchApi._list_files,
    ("GET", True, ""): BatchApi._file,
    ("DELETE", True, ""): BatchApi._delete,
    ("GET", True, "content"): BatchApi._content,
}
_BATCHES: Final = {
    ("POST", False, ""): BatchApi._create,
    ("GET", False, ""): BatchApi._list_batches,
    ("GET", True, ""): BatchApi._batch,
    ("POST", True, "cancel"): BatchApi._cancel,
}


def _discard(file: Any, written: Path) -> None:
    """Delete what was not made a file."""
    file.close()
    written.unlink(missing_ok=True)


def _described(form: FormReader) -> tuple[str, float | None]:
    """Return purpose and end of an uploaded file.

    Raises:
        BadRequest: the form does not say them, or not right.
    """
    if not form.complete:
        raise BadRequest("The form has no end.")
    if form.filename is None:
        raise BadRequest("Missing required parameter: 'file'.", param="file")
    purpose = form.fields.get("purpose")
    if purpose is None:
        raise BadRequest("Missing required parameter: 'purpose'.", param="purpose")
    if purpose not in _PURPOSES:
        raise BadRequest(f"purpose must be one of {', '.join(_PURPOSES)}.", param="purpose")
    said = {
        name[14:-1]: value
        for name, value in form.fields.items()
        if name.startswith("expires_after[") and name.endswith("]")
    }
    kept: dict[str, Any] = dict(said)
    if said.get("seconds", "").isdecimal():
        kept["seconds"] = int(said["seconds"][:12])
    kept_s = _kept_s(kept or None, "expires_after")
    return purpose, None if kept_s is None else unix_s() + kept_s


def _kept_s(said: Any, param: str) -> float | None:
    """Return for how long a file is kept, seconds; ``None`` for ever.

    Raises:
        BadRequest: it is not said right.
    """
    if said is None:
        return None
    if not isinstance(said, dict) or said.get("anchor") != "created_at":
        raise BadRequest(f"{param}.anchor must be 'created_at'.", param=param)
    seconds = said.get("seconds")
    if type(seconds) is not int or not _MIN_KEEP_S <= seconds <= _MAX_KEEP_S:
        text = f"{param}.seconds must be a number from {_MIN_KEEP_S} to {_MAX_KEEP_S}."
        raise BadRequest(text, param=param)
    return float(seconds)


async def _object(asked: Asked) -> dict[str, Any]:
    """Return the JSON object in a body.

    Raises:
        BadRequest: there is none.
    """
    raw = b""
    async for piece in asked.pieces:
        raw += piece
        if len(raw) > MAX_BODY_BYTES:
            raise BadRequest("The body is too large.", status=413, code="body_too_large")
    try:
        found = msgspec.json.decode(raw)
    except (ValueError, RecursionError):
        raise BadRequest("The body is not valid JSON.", code="invalid_json") from None
    if not isinstance(found, dict):
        raise BadRequest("The body must be a JSON object.", code="invalid_json")
    return found


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if value is None:
        raise BadRequest(f"Missing required parameter: '{name}'.", param=name)
    if not isinstance(value, str) or not value:
        raise BadRequest(f"{name} must be text.", param=name)
    return value


def _input(find: Callable[[str, str], File], owner: str, file_id: str) -> File:
    try:
        return find(owner, file_id)
    except BadRequest as error:
        raise BadRequest(str(error), param="input_file_id", status=404) from None


def _window_s(window: str) -> float:
    """Return the seconds of a completion window: OpenAI's ``24h``, or another number of m, h, d.

    Raises:
        BadRequest: it is none.
    """
    number, unit = window[:-1], _WINDOWS.get(window[-1:])
    if unit is None or not number.isdecimal() or len(number) > 6:
        text = "completion_window must be like 24h, 90m or 2d."
        raise BadRequest(text, param="completion_window")
    seconds = int(number) * unit
    if not 60.0 <= seconds <= _MAX_WINDOW_S:
        text = "completion_window must be from 1m to 14d."
        raise BadRequest(text, param="completion_window")
    return seconds


def _metadata(said: Any) -> dict[str, str] | None:
    if said is None:
        return None
    right = isinstance(said, dict) and all(
        isinstance(value, str) and len(value) <= 512 and len(name) <= 64
        for name, value in said.items()
    )
    if not right or len(said) > _MAX_METADATA:
        text = "metadata must be at most 16 texts of up to 512 characters, by names of up to 64."
        raise BadRequest(text, param="metadata")
    return dict(said)


def _limit(query: Mapping[str, str], what: str) -> int:
    said = query.get("limit")
    if said is None:
        return _PAGE[what]
    if not said.isdecimal() or len(said) > 6 or not 1 <= int(said) <= _MAX_PAGE[what]:
        raise BadRequest(f"limit must be from 1 to {_MAX_PAGE[what]}.", param="limit")
    return int(said)


def _listed(found: list[dict[str, Any]], *, more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": found,
        "first_id": found[0]["id"] if found else None,
        "last_id": found[-1]["id"] if found else None,
        "has_more": more,
    }


def _too_large(most: int) -> BadRequest:
    text = f"The file is too large: at most {math.floor(most / 2**20)} MiB are taken."
    return BadRequest(text, status=413, param="file", code="file_too_large")


def _full() -> BadRequest:
    text = "There is no room for this file; delete others first."
    return BadRequest(text, status=413, param="file", code="storage_full")
