"""A server with OpenAI's Files and Batch API, as the commands ask it."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import secrets
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.option import is_http_url
from hexgen_vllm.wire import from_json

DEFAULT_URL: Final = "http://127.0.0.1:30000/v1"
_TIMEOUT_S: Final = 60.0
_PIECE_BYTES: Final = 2**18


class ServerAway(ConfigError):  # noqa: N818 - it may be there later
    """The server is not there, or not well; it may be later."""


class NoSuchThing(ConfigError):  # noqa: N818 - named after what was said
    """The server does not know what was asked for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which server is asked."""
    parser.add_argument(
        "--base-url",
        metavar="URL",
        default=os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL,
        help=f"the server (default: $OPENAI_BASE_URL or {DEFAULT_URL})",
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get("OPENAI_API_KEY"),
        help="key for it (default: $OPENAI_API_KEY)",
    )


class BatchServer:
    """A server.

    Args:
        base_url: as OpenAI's clients take it; ``/v1`` may be left out.
        key: for it.

    Attributes:
        url: where it is.

    Raises:
        ConfigError: the address is none.
    """

    def __init__(self, base_url: str, key: str | None) -> None:
        if not is_http_url(base_url):
            raise ConfigError(f"--base-url must be like {DEFAULT_URL}, not {base_url!r}.")
        parts = urlsplit(base_url)
        self._host, self._port = parts.hostname or "", parts.port
        path = parts.path.rstrip("/")
        self._prefix = path if path.endswith("/v1") else f"{path}/v1"
        self._secure = parts.scheme == "https"
        self.url = f"{parts.scheme}://{parts.netloc}{self._prefix}"
        self._key = key

    @classmethod
    def of(cls, args: argparse.Namespace) -> BatchServer:
        """Return the server that a command line names."""
        return cls(args.base_url, args.api_key)

    def get(self, path: str) -> dict[str, Any]:
        """Return what is at ``path``.

        Raises:
            ConfigError: it cannot be had; one sentence says why.
        """
        return self._asked("GET", path, None, {})

    def post(self, path: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to ``content``.

        Raises:
            ConfigError: there is none; one sentence says why.
        """
        body = json.dumps(content).encode()
        return self._asked("POST", path, body, {"Content-Type": "application/json"})

    def batches(self) -> Iterator[dict[str, Any]]:
        """Yield all batches, newest first.

        Raises:
            ConfigError: they cannot be had.
        """
        after = ""
        while True:
            page = self.get(f"/batches?limit=100{after}")
            found = page.get("data") or []
            yield from found
            if not (found and page.get("has_more")):
                return
            after = f"&after={quote(str(page.get('last_id')), safe='')}"

    def batch(self, batch_id: str) -> dict[str, Any]:
        """Return a batch.

        Raises:
            ConfigError: it cannot be had.
        """
        return self.get(f"/batches/{quote(batch_id, safe='')}")

    def upload(self, path: Path) -> str:
        """Return the id of the file that ``path`` becomes.

        Raises:
            ConfigError: the server does not take it.
        """
        mark = secrets.token_hex(16)
        name = path.name.replace("\\", "_").replace('"', "_")
        said = 'Content-Disposition: form-data; name="'
        head = (
            f'--{mark}\r\n{said}purpose"\r\n\r\nbatch\r\n'
            f'--{mark}\r\n{said}file"; filename="{name}"\r\n'
            "Content-Type: application/jsonl\r\n\r\n"
        ).encode("utf-8", "replace")
        tail = f"\r\n--{mark}--\r\n".encode()

        def pieces() -> Iterator[bytes]:
            yield head
            with path.open("rb") as file:
                while piece := file.read(_PIECE_BYTES):
                    yield piece
            yield tail

        length = len(head) + path.stat().st_size + len(tail)
        named = {
            "Content-Type": f"multipart/form-data; boundary={mark}",
            "Content-Length": str(length),
        }
        return str(self._asked("POST", "/files", pieces(), named)["id"])

    def download(self, file_id: str, path: Path) -> None:
        """Append the content of a file to ``path``.

        Raises:
            ConfigError: it cannot be had as a whole.
        """
        connection = self._connection()
        try:
            answer = self._answer(connection, "GET", f"/files/{file_id}/content", None, {})
            if answer.status != 200:
                raise _refused(answer.status, answer.read())
            with path.open("ab") as file:
                while piece := answer.read(_PIECE_BYTES):
                    file.write(piece)
            if answer.length:
                raise ServerAway(f"the answer of {self.url} broke off.")
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None
        finally:
            connection.close()

    def _asked(
        self, method: str, path: str, body: Any, headers: Mapping[str, str]
    ) -> dict[str, Any]:
        connection = self._connection()
        try:
            answer = self._answer(connection, method, path, body, headers)
            raw = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None
        finally:
            connection.close()
        if answer.status != 200:
            raise _refused(answer.status, raw)
        try:
            found = from_json(raw)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ConfigError(f"{self.url} gives no JSON: is it a server for batches?")
        return found

    def _connection(self) -> http.client.HTTPConnection:
        if self._secure:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(
                self._host, self._port, timeout=_TIMEOUT_S, context=context
            )
        return http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT_S)

    def _answer(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: Any,
        headers: Mapping[str, str],
    ) -> http.client.HTTPResponse:
        key = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        # One that hangs up may have said why before.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request(method, self._prefix + path, body, {**headers, **key})
        return connection.getresponse()

    def _unreachable(self, error: Exception) -> ServerAway:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return ServerAway(f"{self.url} cannot be asked: {why}.")


def _refused(status: int, raw: bytes) -> ConfigError:
    """Return the error for what a server has refused."""
    try:
        text = str(from_json(raw)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        text = f"the server answers {status}."
    if status in (429, 500, 502, 503, 504):
        return ServerAway(text)
    return (NoSuchThing if status == 404 else ConfigError)(text)
