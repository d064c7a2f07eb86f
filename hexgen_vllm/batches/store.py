"""Files, batches and answers on disk, safe from a crash at any moment.

    DIR/batches.sqlite   what there is, and the answers of batches that have not ended
    DIR/files/file-…     what was uploaded, and the output of batches
    DIR/leader.lock      held by the one process that sends requests

An answer counts once it is committed: (batch, line) is unique there, so that no line has two. The
output of a batch is written from the table when the batch ends, and appears together with its
last status, or not at all. SQLite's write-ahead log lets several processes of one machine share a
folder; whichever holds the lock runs the batches, and the kernel takes the lock from the dead.

Nothing here waits for a network, but everything waits for the disk: :class:`Disk` does it in a
thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from hexgen_vllm.clock import unix_s
from hexgen_vllm.errors import BadRequest, ConfigError

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
OPEN: Final = ("validating", "in_progress", "finalizing", "cancelling")
"""Statuses of batches that have not ended."""

ENDED: Final = ("completed", "failed", "expired", "cancelled")
DATABASE: Final = "batches.sqlite"
_STALE_S: Final = 3600.0  # a file that nobody knows, and nobody has written to for so long
_REMEMBERED_S: Final = 90 * 86400.0  # a batch that has ended
_PAGE: Final = 256  # answers read or deleted at once
_PAGE_BYTES: Final = 2**21
_FREE_BYTES: Final = 2**28  # of the disk that stay free
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, seq INTEGER, owner TEXT, filename TEXT, purpose TEXT, bytes INTEGER,
    created REAL, expires REAL
);
CREATE INDEX IF NOT EXISTS files_of ON files (owner, seq);
CREATE TABLE IF NOT EXISTS batches (
    id TEXT PRIMARY KEY, seq INTEGER, owner TEXT, status TEXT, completed INTEGER, failed INTEGER,
    answer_bytes INTEGER, cancelled INTEGER, job TEXT
);
CREATE INDEX IF NOT EXISTS batches_of ON batches (owner, seq);
CREATE INDEX IF NOT EXISTS batches_open ON batches (status);
CREATE TABLE IF NOT EXISTS answers (batch TEXT, line INTEGER, ok INTEGER, record BLOB);
CREATE UNIQUE INDEX IF NOT EXISTS answers_once ON answers (batch, line);
CREATE TABLE IF NOT EXISTS begun (batch TEXT, line INTEGER, tries INTEGER,
    PRIMARY KEY (batch, line)) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Limits of a store.

    Attributes:
        folder: where files, batches and answers are.
        max_file_bytes: largest file that can be uploaded.
        max_requests: requests of one batch.
        max_bytes: of all files and answers on disk.
        max_tenant_bytes: of those of one tenant.
        max_body_bytes: of one request.
        max_open: batches of one tenant that have not ended.
    """

    folder: Path
    max_file_bytes: int = 200 * 2**20
    max_requests: int = 50_000
    max_bytes: int = 20 * 2**30
    max_tenant_bytes: int = 20 * 2**30
    max_body_bytes: int = 64 * 2**20
    max_open: int = 100


class File(NamedTuple):
    """A file.

    Attributes:
        id: of it.
        owner: the tenant whose it is.
        filename: what it was called.
        purpose: what it is for.
        bytes: its size.
        created: in seconds since 1970.
        expires: the same, ``None`` for never.
    """

    id: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    created: float
    expires: float | None

    def told(self) -> dict[str, Any]:
        """Return OpenAI's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": int(self.created),
            "expires_at": None if self.expires is None else int(self.expires),
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


@dataclass(slots=True)
class BatchJob:
    """A batch.

    Attributes:
        id: of it.
        owner: the tenant whose it is.
        tenant: whose its calls are.
        scoped: ids of its workflows belong to the tenant.
        max_priority: the most that its calls can claim.
        endpoint: path of its calls.
        input_file: with its requests.
        output_file: gets the answers.
        error_file: gets what failed.
        window: as the client said it.
        created: seconds since 1970.
        expires: the same.
        metadata: the client's.
        output_expires: seconds that its output is kept, ``None`` for ever.
        status: OpenAI's word.
        times: when it got a status, by the name of the field.
        total: requests in it.
        completed: those that were answered well.
        failed: those that were not.
        errors: what is wrong with the input.
        answer_bytes: of the answers so far.
        has_output: there is an output file.
        has_errors: there is an error file.
        cancelled: somebody wants it to end.
    """

    id: str
    owner: str
    tenant: str
    endpoint: str
    input_file: str
    window: str
    created: float
    expires: float
    output_file: str
    error_file: str
    scoped: bool = False
    max_priority: int = 0
    metadata: dict[str, str] | None = None
    output_expires: float | None = None
    status: str = "validating"
    times: dict[str, float] = field(default_factory=dict)
    total: int = 0
    completed: int = 0
    failed: int = 0
    errors: list[dict[str, Any]] = field(default_factory=list)
    answer_bytes: int = 0
    has_output: bool = False
    has_errors: bool = False
    cancelled: bool = False

    def told(self) -> dict[str, Any]:
        """Return OpenAI's batch object."""
        names = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling",
                 "cancelled")  # fmt: skip
        times = {f"{n}_at": None if n not in self.times else int(self.times[n]) for n in names}
        status = "cancelling" if self.cancelled and self.status in OPEN else self.status
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "input_file_id": self.input_file,
            "completion_window": self.window,
            "status": status,
            "output_file_id": self.output_file if self.has_output else None,
            "error_file_id": self.error_file if self.has_errors else None,
            "created_at": int(self.created),
            "expires_at": int(self.expires),
            **times,
            "request_counts": {
                "total": self.total,
                "completed": self.completed,
                "failed": self.failed,
            },
            "metadata": self.metadata,
        }


_COLUMNS: Final = ("id", "owner", "status", "completed", "failed", "answer_bytes", "cancelled")
_KEPT: Final = tuple(n for n in BatchJob.__slots__ if n not in _COLUMNS)
_READ: Final = (
    (", ".join((*File._fields, "seq")), "files"),
    (", ".join((*_COLUMNS, "seq", "job")), "batches"),
    ("batch, line, ok, record", "answers"),
    ("batch, line, tries", "begun"),
)


class Answered(NamedTuple):
    """What became of a line.

    Attributes:
        batch: it belongs to.
        line: its number.
        ok: it was answered well.
        record: its line in the output.
    """

    batch: str
    line: int
    ok: bool
    record: bytes


def new_id(kind: str) -> str:
    """Return an id that nobody can guess."""
    return f"{kind}{secrets.token_hex(12)}"


class Store:
    """A folder of files and batches. One thread uses it at a time.

    Args:
        limits: of it.

    Raises:
        ConfigError: the folder cannot be used.
    """

    def __init__(self, limits: StoreLimits) -> None:
        self.limits, self._folder = limits, limits.folder
        self._files = self._folder / "files"
        try:
            self._files.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._base = sqlite3.connect(
                self._folder / DATABASE, timeout=30.0, isolation_level=None, check_same_thread=False
            )
            self._base.execute("PRAGMA auto_vacuum = INCREMENTAL")
            self._base.execute("PRAGMA journal_mode = WAL")
            (self._folder / DATABASE).chmod(0o600)  # its log gets the same
            self._base.execute("PRAGMA synchronous = FULL")
            self._base.executescript(_SCHEMA)
            for columns, table in _READ:  # of a store of another version, too
                self._base.execute(f"SELECT {columns} FROM {table} LIMIT 0")
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"batch_dir {self._folder} cannot be used: {error}.") from None
        self._lock: int | None = None
        self._unreadable: set[str] = set()

    def close(self) -> None:
        """Close it, and let somebody else run the batches."""
        self._base.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def lead(self) -> bool:
        """Return whether this process runs the batches; only one can."""
        if self._lock is not None:
            return True
        lock = os.open(self._folder / "leader.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            return False
        self._lock = lock
        return True

    # Files

    def path(self, file_id: str) -> Path:
        """Return where the content of a file is."""
        return self._files / file_id

    def begin_upload(self) -> Path:
        """Return where a file can be written before it is one."""
        return self._files / new_id(".upload-")

    def room(self, owner: str) -> int:
        """Return how many bytes a tenant may add."""
        asked = "SELECT COALESCE(SUM(bytes), 0) FROM files"
        held = "SELECT COALESCE(SUM(answer_bytes), 0) FROM batches"
        (of_all,) = self._base.execute(asked).fetchone()
        (answers,) = self._base.execute(held).fetchone()
        (own,) = self._base.execute(f"{asked} WHERE owner = ?", (owner,)).fetchone()
        (mine,) = self._base.execute(f"{held} WHERE owner = ?", (owner,)).fetchone()
        disk = os.statvfs(self._folder)
        return int(
            min(
                self.limits.max_bytes - of_all - answers,
                self.limits.max_tenant_bytes - own - mine,
                disk.f_bavail * disk.f_frsize - _FREE_BYTES,
            )
        )

    def add_file(
        self, written: Path, owner: str, filename: str, purpose: str, expires: float | None
    ) -> File:
        """Make a file of what was written at ``written``."""
        one = File(
            new_id("file-"), owner, filename, purpose, written.stat().st_size, unix_s(), expires
        )
        _make_durable(written, self.path(one.id))
        with self._transaction():
            self._insert(one)
        return one

    def _insert(self, one: File) -> None:
        self._base.execute(
            "INSERT OR REPLACE INTO files (id, seq, owner, filename, purpose, bytes, created,"
            " expires) VALUES (?, (SELECT COALESCE(MAX(seq), 0) + 1 FROM files), ?, ?, ?, ?, ?, ?)",
            one,
        )

    def file(self, owner: str, file_id: str) -> File:
        """Return a file of a tenant.

        Raises:
            BadRequest: it has none of this id.
        """
        found = self._base.execute(
            "SELECT id, owner, filename, purpose, bytes, created, expires FROM files"
            " WHERE id = ? AND owner = ?",
            (file_id, owner),
        ).fetchone()
        one = None if found is None else File(*found)
        if one is None or (one.expires is not None and one.expires <= unix_s()):
            raise not_there("File", file_id)
        return one

    def files(
        self, owner: str, limit: int, after: str | None, purpose: str | None, *, newest_first: bool
    ) -> tuple[list[File], bool]:
        """Return files of a tenant, and whether there are more."""
        mark, order = ("<", "DESC") if newest_first else (">", "ASC")
        asked = "owner = ? AND (expires IS NULL OR expires > ?)"
        values: list[Any] = [owner, unix_s()]
        if purpose is not None:
            asked += " AND purpose = ?"
            values.append(purpose)
        if after is not None:
            asked += f" AND seq {mark} (SELECT seq FROM files WHERE id = ? AND owner = ?)"
            values += [after, owner]
        found = self._base.execute(
            "SELECT id, owner, filename, purpose, bytes, created, expires FROM files"
            f" WHERE {asked} ORDER BY seq {order} LIMIT ?",
            (*values, limit + 1),
        ).fetchall()
        return [File(*row) for row in found[:limit]], len(found) > limit

    def delete_file(self, owner: str, file_id: str) -> None:
        """Forget a file of a tenant.

        Raises:
            BadRequest: it has none of this id, or a batch reads it.
        """
        self.file(owner, file_id)
        if file_id in self._in_use():
            raise BadRequest(
                f"The file {file_id} is the input of a batch that has not ended; cancel it first.",
                status=409,
                param="file_id",
                code="file_in_use",
            )
        self._base.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self.path(file_id).unlink(missing_ok=True)

    def _in_use(self) -> set[str]:
        return {batch.input_file for batch in self.open_batches()}

    # Batches

    def add_batch(self, batch: BatchJob) -> None:
        """Take in a batch.

        Raises:
            BadRequest: its tenant has too many already.
        """
        with self._transaction():
            (open_now,) = self._base.execute(
                f"SELECT COUNT(*) FROM batches WHERE owner = ? AND status IN {OPEN}", (batch.owner,)
            ).fetchone()
            if open_now >= self.limits.max_open:
                raise BadRequest(
                    f"{open_now} batches have not ended; more are not taken.",
                    status=429,
                    code="too_many_batches",
                )
            self._base.execute(
                "INSERT INTO batches (id, seq, owner, status, completed, failed, answer_bytes,"
                " cancelled, job) VALUES"
                " (?, (SELECT COALESCE(MAX(seq), 0) + 1 FROM batches), ?, ?, 0, 0, 0, 0, ?)",
                (batch.id, batch.owner, batch.status, _job(batch)),
            )

    def batch(self, owner: str, batch_id: str) -> BatchJob:
        """Return a batch of a tenant.

        Raises:
            BadRequest: it has none of this id.
        """
        found = self._batches("id = ? AND owner = ?", (batch_id, owner))
        if not found:
            raise not_there("Batch", batch_id)
        return found[0]

    def batches(self, owner: str, limit: int, after: str | None) -> tuple[list[BatchJob], bool]:
        """Return batches of a tenant, newest first, and whether there are more."""
        asked, values = "owner = ?", [owner]
        if after is not None:
            asked += " AND seq < (SELECT seq FROM batches WHERE id = ? AND owner = ?)"
            values += [after, owner]
        found = self._batches(asked, values, f"ORDER BY seq DESC LIMIT {limit + 1}")
        return found[:limit], len(found) > limit

    def open_batches(self) -> list[BatchJob]:
        """Return the batches of all tenants that have not ended, oldest first."""
        return self._batches(f"status IN {OPEN}", (), "ORDER BY seq")

    def _batches(self, asked: str, values: Sequence[object], rest: str = "") -> list[BatchJob]:
        rows = self._base.execute(
            f"SELECT {', '.join(_COLUMNS)}, job FROM batches WHERE {asked} {rest}", values
        )
        found = []
        for *columns, job in rows:
            told = dict(zip(_COLUMNS, columns, strict=True))
            told["cancelled"] = bool(told["cancelled"])
            try:
                found.append(msgspec.convert({**msgspec.json.decode(job), **told}, BatchJob))
            except (ValueError, TypeError, RecursionError) as error:
                self._leave_out(str(told["id"]), error)
        return found

    def _leave_out(self, batch_id: str, error: Exception) -> None:
        """Say once that a batch is none: another version wrote it, or the disk has lost it."""
        if batch_id not in self._unreadable:
            self._unreadable.add(batch_id)
            _LOG.error("batch cannot be read batch=%s error=%s", batch_id, error)

    def cancel(self, owner: str, batch_id: str) -> BatchJob:
        """Note that a batch shall end.

        Raises:
            BadRequest: there is none of this id, or it has ended.
        """
        with self._transaction():  # who runs it may be another process, and write meanwhile
            one = self.batch(owner, batch_id)
            if one.status in ENDED:
                text = f"Cannot cancel a batch with status '{one.status}'."
                raise BadRequest(text, status=409, param="batch_id")
            if not one.cancelled:
                one.cancelled, one.times["cancelling"] = True, unix_s()
                self._base.execute(
                    "UPDATE batches SET cancelled = 1, job = ? WHERE id = ?", (_job(one), batch_id)
                )
        return one

    def save(self, batch: BatchJob) -> None:
        """Write down a new status of a batch; what others wrote meanwhile stays."""
        with self._transaction():
            self._update(batch)

    def _update(self, batch: BatchJob) -> None:
        now = self.batch(batch.owner, batch.id)
        batch.cancelled = now.cancelled
        batch.times = {**now.times, **batch.times}
        batch.times.setdefault(batch.status, unix_s())
        self._base.execute(
            "UPDATE batches SET status = ?, job = ? WHERE id = ?",
            (batch.status, _job(batch), batch.id),
        )

    # Answers

    def add_answers(self, found: Iterable[Answered]) -> None:
        """Write down answers; of a line that has one, the first counts."""
        with self._transaction():
            for one in found:
                done = self._base.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", one)
                if done.rowcount:
                    self._base.execute(
                        "UPDATE batches SET completed = completed + ?, failed = failed + ?,"
                        " answer_bytes = answer_bytes + ? WHERE id = ?",
                        (one.ok, not one.ok, len(one.record), one.batch),
                    )

    def answered_lines(self, batch_id: str) -> set[int]:
        """Return the lines of a batch that have an answer."""
        asked = "SELECT line FROM answers WHERE batch = ?"
        return {line for (line,) in self._base.execute(asked, (batch_id,))}

    def begin(self, batch_id: str, lines: Sequence[int]) -> None:
        """Note that requests are about to be sent, for whoever comes after a crash."""
        with self._transaction():
            self._base.executemany(
                "INSERT INTO begun VALUES (?, ?, 1)"
                " ON CONFLICT (batch, line) DO UPDATE SET tries = tries + 1",
                [(batch_id, line) for line in lines],
            )

    def tries(self, batch_id: str) -> dict[int, int]:
        """Return how often requests without an answer were begun by processes that died."""
        return dict(
            self._base.execute(
                "SELECT line, tries FROM begun WHERE batch = ? AND line NOT IN"
                " (SELECT line FROM answers WHERE batch = ?)",
                (batch_id, batch_id),
            )
        )

    def forget_begun(self) -> None:
        """Note that the process ends in order."""
        self._base.execute("DELETE FROM begun")

    def finish(self, batch: BatchJob, status: str) -> Iterable[None]:
        """Write the output of a batch and end it; a generator, so that others get their turn."""
        outputs = ((batch.output_file, 1, "output"), (batch.error_file, 0, "error"))
        found: list[File] = []
        for file_id, ok, what in outputs:
            size = 0
            written = self._files / f".{file_id}"
            with written.open("wb") as file:
                line = 0
                while page := self._page(batch.id, ok, line):
                    line = page[-1][0]
                    size += file.write(b"".join(record for _, record in page))
                    yield
            if not size:
                written.unlink()
                continue
            _make_durable(written, self.path(file_id))
            now, kept = unix_s(), batch.output_expires
            name, expires = f"{batch.id}_{what}.jsonl", None if kept is None else now + kept
            found.append(File(file_id, batch.owner, name, "batch_output", size, now, expires))
        batch.has_output = any(one.id == batch.output_file for one in found)
        batch.has_errors = any(one.id == batch.error_file for one in found)
        batch.status = status
        with self._transaction():
            for one in found:
                self._insert(one)
            self._update(batch)
            self._base.execute("UPDATE batches SET answer_bytes = 0 WHERE id = ?", (batch.id,))
        yield
        self._base.execute("DELETE FROM begun WHERE batch = ?", (batch.id,))
        some = "SELECT rowid FROM answers WHERE batch = ? LIMIT ?"
        while self._base.execute(
            f"DELETE FROM answers WHERE rowid IN ({some})", (batch.id, _PAGE)
        ).rowcount:
            yield

    def _page(self, batch_id: str, ok: int, after: int) -> list[tuple[int, bytes]]:
        found: list[tuple[int, bytes]] = []
        size = 0
        rows = self._base.execute(
            "SELECT line, record FROM answers WHERE batch = ? AND line > ? AND ok = ?"
            " ORDER BY line LIMIT ?",
            (batch_id, after, ok, _PAGE),
        )
        for row in rows:
            found.append(row)
            size += len(row[1])
            if size >= _PAGE_BYTES:
                break
        rows.close()
        return found

    def sweep(self) -> None:
        """Delete what has expired, and what a crash left behind."""
        now, used = unix_s(), self._in_use()
        for (file_id,) in self._base.execute(
            "SELECT id FROM files WHERE expires <= ?", (now,)
        ).fetchall():
            if file_id not in used:
                self._base.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self._base.execute(
            f"DELETE FROM batches WHERE status IN {ENDED} AND json_extract(job, '$.created') < ?",
            (now - _REMEMBERED_S,),
        )
        known = {file_id for (file_id,) in self._base.execute("SELECT id FROM files")}
        for path in self._files.iterdir():
            with contextlib.suppress(OSError):
                if path.name not in known and now - path.stat().st_mtime > _STALE_S:
                    path.unlink()
        self._base.execute(f"DELETE FROM answers WHERE batch IN"
                           f" (SELECT id FROM batches WHERE status IN {ENDED})")  # fmt: skip

        # A script, as a statement of this kind would be stepped once only: one page.
        self._base.executescript("PRAGMA incremental_vacuum(5000)")

    @contextlib.contextmanager
    def _transaction(self) -> Any:
        self._base.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._base.execute("ROLLBACK")
            raise
        self._base.execute("COMMIT")


def check_folder(folder: Path) -> None:
    """Return if a store can be in ``folder``, which is made if it is not there.

    Raises:
        ConfigError: it cannot.
    """
    try:
        (folder / "files").mkdir(parents=True, exist_ok=True, mode=0o700)
        probe = folder / new_id(".probe-")
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"batch_dir {folder} cannot be used: {error.strerror}.") from None


def not_there(what: str, one_id: str) -> BadRequest:
    """Return the refusal of an id that does not exist, or belongs to another tenant."""
    shown = one_id if len(one_id) <= 100 else f"{one_id[:100]}..."
    return BadRequest(f"No such {what} object: {shown}", status=404, param="id")


def _job(batch: BatchJob) -> str:
    return json.dumps({name: getattr(batch, name) for name in _KEPT})


def _make_durable(written: Path, path: Path) -> None:
    """Move a file to where it stays, so that it is whole there even if the power fails."""
    with written.open("rb") as file:
        os.fsync(file.fileno())
    written.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Disk:
    """A store, and files, used from an event loop without stopping it.

    Args:
        limits: of the store.

    Attributes:
        store: for :meth:`do` only.

    Raises:
        ConfigError: the folder cannot be used.
    """

    def __init__(self, limits: StoreLimits) -> None:
        self.store = Store(limits)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hexgen-batches")
        # To read and write long files must not hold up questions about them.
        self._files = ThreadPoolExecutor(2, thread_name_prefix="hexgen-batch-files")

    async def do(self, work: Callable[..., T], *args: object) -> T:
        """Return ``work(*args)``, a method of the store."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    async def with_file(self, work: Callable[..., T], *args: object) -> T:
        """Return ``work(*args)``, which reads or writes files."""
        return await asyncio.get_running_loop().run_in_executor(self._files, work, *args)

    def close(self) -> None:
        """Close the store when what is under way has ended."""
        self._files.shutdown()
        self._thread.shutdown()
        self.store.close()
