"""The lines of a request file: OpenAI's, which are those of ``vllm run-batch`` as well.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}

and of an output file:

    {"id": "batch_req_…", "custom_id": "a", "response": {"status_code", "request_id", "body"},
     "error": null}
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from hexgen_vllm.wire import from_json

ANY_ENDPOINT: Final = "*"
"""The ``endpoint`` of a batch whose lines each say theirs."""

MAX_ERRORS: Final = 100
"""Wrong lines that a batch tells of; it then says how many more there are."""

MAX_ID_CHARS: Final = 512
_PATH: Final = re.compile(r"(?:/[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}){1,8}")
# As many values take no more than 20 ms to decode; what stands in strings is not counted.
_MAX_VALUES: Final = 2**17
_LARGE_BYTES: Final = 2**16
Serves = Callable[[str], bool]


class InputLine(msgspec.Struct, frozen=True):
    """One request as it stands in a file; what else is there is left alone.

    Attributes:
        custom_id: names it in the output.
        method: ``POST``.
        url: path of the call.
        body: of the call, byte for byte.
    """

    custom_id: str
    url: str
    body: msgspec.Raw
    method: str


class _Head(msgspec.Struct, frozen=True):
    stream: Any = None


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One request of a batch.

    Attributes:
        number: its line, from 1.
        custom_id: names it in the output.
        url: path of the call.
        body: of the call, byte for byte.
    """

    number: int
    custom_id: str
    url: str
    body: bytes


class WrongLine(Exception):  # noqa: N818 - the client's
    """A line is no request.

    Attributes:
        code: machine-readable, in OpenAI's words where it has one.
        param: the field at fault, ``None`` for the line as a whole.
    """

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param

    def told(self, number: int) -> dict[str, Any]:
        """Return the entry of ``batch.errors.data``."""
        return {"code": self.code, "line": number, "message": str(self), "param": self.param}


_DECODER: Final = msgspec.json.Decoder(InputLine)
_HEAD_DECODER: Final = msgspec.json.Decoder(_Head)
_FIELDS: Final = {"custom_id": str, "method": str, "url": str, "body": dict}


def parse(number: int, text: bytes, max_bytes: int) -> BatchRequest:
    """Return the request in a line.

    Args:
        number: of the line, from 1.
        text: the line.
        max_bytes: longest body.

    Raises:
        WrongLine: it is none.
    """
    if len(text) > _LARGE_BYTES and _values(text) > _MAX_VALUES:
        raise WrongLine("invalid_request", "The line holds too many values.")
    try:
        line = _DECODER.decode(text)
    except (msgspec.ValidationError, RecursionError):
        raise _why(text) from None
    except (msgspec.DecodeError, ValueError):
        raise _not_json() from None
    if line.method != "POST":
        raise WrongLine("invalid_method", "The method must be POST.", "method")
    if not 0 < len(line.custom_id) <= MAX_ID_CHARS:
        text_ = f"custom_id must have 1 to {MAX_ID_CHARS} characters."
        raise WrongLine("invalid_custom_id", text_, "custom_id")
    body = bytes(line.body)
    if len(body) > max_bytes:
        text_ = f"The body must have at most {max_bytes} bytes."
        raise WrongLine("body_too_large", text_, "body")
    try:
        head = _HEAD_DECODER.decode(body)
    except msgspec.DecodeError:
        raise WrongLine("invalid_type", "body must be a JSON object.", "body") from None
    if head.stream not in (None, False):
        raise WrongLine("invalid_request", "A batch has no streams.", "body.stream")
    return BatchRequest(number, line.custom_id, line.url, body)


def check_url(request: BatchRequest, endpoint: str, serves: Serves) -> None:
    """Check that a batch for ``endpoint`` may hold ``request``.

    Raises:
        WrongLine: it may not.
    """
    if endpoint not in (ANY_ENDPOINT, request.url):
        text = f"The URL must be the endpoint of the batch, {endpoint}."
        raise WrongLine("invalid_url", text, "url")
    if not servable(request.url, serves):
        raise WrongLine("invalid_url", "This endpoint takes no batches.", "url")


def servable(url: str, serves: Serves) -> bool:
    """Whether ``url`` is a plain path that takes batches."""
    return _PATH.fullmatch(url) is not None and serves(url)


def _not_json() -> WrongLine:
    return WrongLine("invalid_json_line", "This line is not parseable as valid JSON.")


def _why(text: bytes) -> WrongLine:
    """Return what is wrong with a line that is no request, though it may be JSON."""
    try:
        found = from_json(text)
    except ValueError:
        return _not_json()
    if not isinstance(found, dict):
        return WrongLine("invalid_json_line", "This line is no JSON object.")
    for name, kind in _FIELDS.items():
        if name not in found:
            said = f"Missing required parameter: '{name}'."
            return WrongLine("missing_required_parameter", said, name)
        if not isinstance(found[name], kind):
            what = "a JSON object" if kind is dict else "text"
            return WrongLine("invalid_type", f"{name} must be {what}.", name)
    return _not_json()


def _values(text: bytes) -> int:
    found = text.count(b",") + text.count(b"[") + text.count(b"{")
    if found <= _MAX_VALUES:
        return found
    bare = b"".join(text.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    return bare.count(b",") + bare.count(b"[") + bare.count(b"{")


def answered(line_id: str, custom_id: str, status: int, request_id: str, body: bytes) -> bytes:
    """Return the line of an output file for an answer.

    Args:
        line_id: of the line.
        custom_id: of the request.
        status: of the answer.
        request_id: of the answer.
        body: of the answer; what is no JSON becomes text.
    """
    try:
        msgspec.json.decode(body, type=msgspec.Raw)
        said = b" ".join(body.splitlines()) if b"\n" in body or b"\r" in body else body
    except (msgspec.DecodeError, RecursionError):
        said = _json(body.decode("utf-8", "replace"))
    head = f'{{"id":{_text(line_id)},"custom_id":{_text(custom_id)},"response":'
    response = f'{{"status_code":{status},"request_id":{_text(request_id)},"body":'
    return b"".join((head.encode(), response.encode(), said or b"null", b'},"error":null}\n'))


def unanswered(line_id: str, custom_id: str, code: str, message: str) -> bytes:
    """Return the line of an error file for a request that got no answer."""
    found = {"id": line_id, "custom_id": custom_id, "response": None}
    return _json({**found, "error": {"code": code, "message": message}}) + b"\n"


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _text(value: str) -> str:
    return _json(value).decode()
