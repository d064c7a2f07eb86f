"""``hexgen-vllm batch run FILE``: the answers to a file of requests, in one command.

It uploads the file, has the server make a batch of it, waits, and writes all answers to one file,
good ones first. What it has begun is noted beside the output: interrupted, at whatever moment, the
same command goes on with the same batch.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import secrets
import sys
import threading
from pathlib import Path
from typing import Any, Final, TextIO

import msgspec

from hexgen_vllm.batches import client
from hexgen_vllm.batches.client import BatchServer, NoSuchThing, ServerAway
from hexgen_vllm.batches.lines import ANY_ENDPOINT
from hexgen_vllm.batches.store import ENDED
from hexgen_vllm.clock import SystemClock
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.wire import from_json

_CLOCK: Final = SystemClock()
_NEVER: Final = threading.Event()
_NOTE: Final = ".batch"
_RUN: Final = "hexgen_run"
_LONGEST_POLL_S: Final = 5.0
_FIRST_POLL_S: Final = 0.1
_TOLD_S: Final = 10.0  # between lines of progress where they are not written over
_LONGEST_GAP_S: Final = 600.0
_SHOWN: Final = 20


class _Url(msgspec.Struct):
    url: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hexgen-vllm batch run``."""
    parser.add_argument("file", type=Path, metavar="FILE", help="requests, one JSON object a line")
    client.add_arguments(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="answers (default: FILE.results.jsonl)"
    )
    parser.add_argument(
        "--window", default="24h", metavar="TIME", help="time it may take (default: 24h)"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=_LONGEST_GAP_S,
        metavar="SECONDS",
        help="longest time without a server while it waits (default: 600)",
    )


def main(args: argparse.Namespace) -> int:
    """Get the answers; return 0 if all are good, 1 if some are not, 2 if the file is wrong.

    Raises:
        ConfigError: a file or the server cannot be used.
    """
    source: Path = args.file
    out = args.out or source.with_name(f"{source.stem}.results.jsonl")
    run = _Run(BatchServer.of(args), source, out, args.window, args.patience)
    try:
        return run.run()
    except KeyboardInterrupt:
        end = f"; hexgen-vllm batch cancel {run.batch} ends it" if run.batch else ""
        print(f"\ninterrupted: the same command goes on{end}.", file=sys.stderr)
        return 130


class _Run:
    """One run of a file."""

    def __init__(
        self, server: BatchServer, source: Path, out: Path, window: str, patience_s: float
    ) -> None:
        self._server, self._source, self._out = server, source, out
        self._window, self._patience_s = window, patience_s
        self._note = out.with_name(out.name + _NOTE)
        self.batch = ""
        self._met = False  # the server has been there, in this run or an earlier one

    def run(self) -> int:
        """Run it; return the exit code."""
        digest, endpoint = _looked_through(self._source)
        token = self._token(digest)
        batch = self._patiently(lambda: self._begun(token) or self._begin(token, endpoint))
        self.batch = str(batch["id"])
        print(f"batch {self.batch} at {self._server.url}", file=sys.stderr)
        batch = self._ended(batch)
        if batch["status"] == "failed":
            self._note.unlink(missing_ok=True)
            return self._tell_wrong(batch)
        self._download(batch)
        self._note.unlink(missing_ok=True)
        counts = batch["request_counts"]
        good, total = counts["completed"], counts["total"]
        print(
            f"{batch['status']}: {good} of {total} requests were answered well: {self._out}",
            file=sys.stderr,
        )
        return 0 if batch["status"] == "completed" and good == total else 1

    def _token(self, digest: str) -> str:
        """Return what marks the batch of this run, of one that was interrupted if there is one."""
        about = {"file": digest, "server": self._server.url}
        try:
            found = from_json(self._note.read_text())
            if {name: found.get(name) for name in about} == about:
                self._met = True
                return str(found["run"])
        except (OSError, ValueError, KeyError, AttributeError):
            pass
        token = secrets.token_hex(12)
        try:
            self._note.write_text(json.dumps({**about, "run": token}))
        except OSError as error:
            raise ConfigError(f"{self._note} cannot be written: {error.strerror}.") from None
        return token

    def _begun(self, token: str) -> dict[str, Any] | None:
        every = self._server.batches()
        mine = (one for one in every if (one.get("metadata") or {}).get(_RUN) == token)
        found = next(mine, None)
        self._met = True
        return found

    def _begin(self, token: str, endpoint: str) -> dict[str, Any]:
        print(f"uploading {self._source}", file=sys.stderr)
        file = self._server.upload(self._source)
        return self._server.post(
            "/batches",
            {
                "input_file_id": file,
                "endpoint": endpoint,
                "completion_window": self._window,
                "metadata": {_RUN: token},
            },
        )

    def _patiently(self, ask: Any) -> Any:
        """Return what ``ask`` returns, once the server is there."""
        began_s, wait_s = _CLOCK.now(), 0.25
        while True:
            try:
                return ask()
            except ServerAway as error:
                if not self._met or _CLOCK.now() - began_s > self._patience_s:
                    raise
                print(f"{error} Waiting.", file=sys.stderr)
            _NEVER.wait(wait_s)
            wait_s = min(wait_s * 2.0, _LONGEST_POLL_S)

    def _ended(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Wait until the batch has ended."""
        progress, wait_s = _Progress(sys.stderr), _FIRST_POLL_S
        while batch["status"] not in ENDED:
            progress.show(batch)
            _NEVER.wait(wait_s)
            wait_s = min(wait_s * 1.5, _LONGEST_POLL_S)
            batch = self._patiently(lambda: self._server.batch(self.batch))
        progress.show(batch, last=True)
        return batch

    def _download(self, batch: dict[str, Any]) -> None:
        """Write the output; it is there as a whole or not at all."""
        part = self._out.with_name(self._out.name + ".part")

        def once() -> None:
            part.write_bytes(b"")
            for name in ("output_file_id", "error_file_id"):
                if batch.get(name):
                    self._server.download(batch[name], part)

        try:
            self._patiently(once)
            part.replace(self._out)
        except OSError as error:
            raise ConfigError(f"{self._out} cannot be written: {error.strerror}.") from None
        except NoSuchThing as error:
            raise ConfigError(f"the answers are not there any more: {error}") from None

    def _tell_wrong(self, batch: dict[str, Any]) -> int:
        errors = (batch.get("errors") or {}).get("data") or []
        for error in errors[:_SHOWN]:
            at = f":{error['line']}" if error.get("line") else ""
            print(f"{self._source}{at}: {error.get('message')}", file=sys.stderr)
        if len(errors) > _SHOWN:
            print(f"... and {len(errors) - _SHOWN} more", file=sys.stderr)
        return 2


class _Progress:
    """Shows how far a batch is."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._live = stream, stream.isatty()
        self._began: tuple[float, int] | None = None
        self._told_s, self._told = 0.0, ""

    def show(self, batch: dict[str, Any], *, last: bool = False) -> None:
        """Show it, if that tells something new."""
        now, counts = _CLOCK.now(), batch["request_counts"]
        done = counts["completed"] + counts["failed"]
        if self._began is None and done:
            self._began = now, done
        text = f"{batch['status']} {done}/{counts['total']}"
        if counts["failed"]:
            text += f", {counts['failed']} failed"
        if self._began is not None and now > self._began[0] and done > self._began[1]:
            rate = (done - self._began[1]) / (now - self._began[0])
            text += f", {rate:.1f}/s"
            if not last and batch["status"] == "in_progress":
                text += f", {(counts['total'] - done) / rate:.0f} s left"
        if self._live:
            end = "\n" if last else ""
            print(f"\r\033[K{text}", end=end, file=self._stream, flush=True)
        elif text.split(",")[0] != self._told and (last or now - self._told_s >= _TOLD_S):
            self._told_s, self._told = now, text.split(",")[0]
            print(text, file=self._stream, flush=True)


def _looked_through(path: Path) -> tuple[str, str]:
    """Return a digest of a file of requests, and the endpoint that they are for.

    Raises:
        ConfigError: it cannot be read, or is empty.
    """
    decoder, urls = msgspec.json.Decoder(_Url), set[str]()
    digest, empty = hashlib.sha256(), True
    try:
        with path.open("rb") as file:
            for line in file:
                digest.update(line)
                if not line.strip():
                    continue
                empty = False
                # Of a wrong line the server says what it is, with its number.
                with contextlib.suppress(ValueError, RecursionError):
                    urls.add(decoder.decode(line.removeprefix(b"\xef\xbb\xbf")).url)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    if empty:
        raise ConfigError(f"{path} has no requests.")
    urls.discard("")
    return digest.hexdigest(), urls.pop() if len(urls) == 1 else ANY_ENDPOINT
