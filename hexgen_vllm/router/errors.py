"""What clients are told when something goes wrong: OpenAI error objects, always.

Nothing here may name an engine's address or show a stack trace.
"""

from __future__ import annotations

import json
import logging
import math
import re
from enum import Enum
from typing import Any, Final, NamedTuple

from aiohttp import web

from hexgen_vllm.errors import BadRequest, HexgenError, Refused, error_object
from hexgen_vllm.router.http.messages import (
    REQUEST_ID_HEADER,
    SERVER,
    json_response,
)
from hexgen_vllm.router.http.request import Request
from hexgen_vllm.wire import json_object


class ClientGone(Exception):  # noqa: N818 - not a defect
    """The client closed its connection, or does not read from it."""


_LOG = logging.getLogger(__name__)
_REFUSALS: Final = {
    404: "The engine does not serve this endpoint.",
    501: "The engine cannot do this.",
}
_WORD: Final = re.compile(r"[A-Za-z0-9_ -]{1,64}")
_TRACE: Final = re.compile(rb'Traceback \(most recent|File \\*"[^"]+", line \d|\bobject at 0x')
_ADDRESS: Final = re.compile(
    rb"\b\d{1,3}(?:\.\d{1,3}){3}:\d|(?:/[\w.-]+){2,}\.(?:py|so)\b|0x[0-9a-f]{8}"
)
_EVENT_DATA: Final = re.compile(rb"(^data: ?)([^\n\r]+)", re.M)
REASON_HEADER: Final = "x-llm-d-request-dropped-reason"
"""Has the reason of every refusal."""


class Blame(Enum):
    """Who caused that a call ended as it did."""

    NOBODY = "nobody"
    CLIENT = "client"
    LOAD = "load"
    ENGINE = "engine"
    OPERATOR = "operator"
    ROUTER = "router"


class Outcome(str, Enum):
    """How a call can end: the word for metrics, logs, traces and the code of the error object.

    What follows from each is in :data:`ENDINGS`.
    """

    ANSWERED = "answered"
    BAD_REQUEST = "bad-request"
    CLIENT_GONE = "rejected-context-cancelled"
    SATURATED = "rejected-saturated"
    NO_ENDPOINTS = "rejected-no-endpoints"
    EXPIRED = "rejected-ttl-expired"
    OUT_OF_CONNECTIONS = "rejected-out-of-connections"
    SHUTTING_DOWN = "rejected-shutting-down"
    REFUSED = "rejected-by-policy"
    BUSY = "engine-busy"
    ERROR = "engine-error"
    LOST = "engine-lost"
    TIMEOUT = "engine-timeout"
    INTERNAL = "internal-error"

    def __str__(self) -> str:
        return str(self.value)

    @property
    def ending(self) -> Ending:
        """What it means and becomes."""
        return ENDINGS[self]

    @classmethod
    def of(cls, reason: str) -> Outcome:
        """Return the outcome of a call that was refused or failed for ``reason``."""
        try:
            return cls(reason)
        except ValueError:  # a word of a policy's own
            return cls.REFUSED


class Ending(NamedTuple):
    """What an outcome means, and the error object that it becomes.

    Attributes:
        status: of the answer; where others know better, what is usual.
        message: of the error object.
        blame: who caused it.
        meaning: in words, for the documentation.
        engine_is_well: what it says of the engine, ``None`` for nothing.
    """

    status: int
    message: str
    blame: Blame
    meaning: str
    engine_is_well: bool | None = None


ENDINGS: Final[dict[Outcome, Ending]] = {
    Outcome.ANSWERED: Ending(200, "", Blame.NOBODY, "answered in full", True),
    Outcome.BAD_REQUEST: Ending(
        400, "The request is wrong.", Blame.CLIENT, "wrong, says the router or an engine", True
    ),
    Outcome.CLIENT_GONE: Ending(
        499, "The client is gone.", Blame.CLIENT, "the client left, or does not read"
    ),
    Outcome.SATURATED: Ending(
        429, "Too many calls are open.", Blame.LOAD, "too many calls or tokens wait or are open"
    ),
    Outcome.NO_ENDPOINTS: Ending(
        503, "No engine can take this call now.", Blame.LOAD, "no engine with the model gets calls"
    ),
    Outcome.EXPIRED: Ending(
        504, "No engine had room for this call in time.", Blame.LOAD, "waited too long for room"
    ),
    Outcome.OUT_OF_CONNECTIONS: Ending(
        503,
        "The router has no connections left.",
        Blame.ROUTER,
        "no descriptor, port or memory is left for a connection",
    ),
    Outcome.SHUTTING_DOWN: Ending(
        503, "The router is shutting down.", Blame.OPERATOR, "the router stops"
    ),
    Outcome.REFUSED: Ending(
        503, "The call was refused.", Blame.LOAD, "refused by a policy for a reason of its own"
    ),
    Outcome.BUSY: Ending(
        503, "The engine is too busy.", Blame.ENGINE, "every engine that was asked refused it"
    ),
    Outcome.ERROR: Ending(
        502, "The engine failed.", Blame.ENGINE, "an engine answered 5xx or nonsense", False
    ),
    Outcome.LOST: Ending(
        502,
        "The engine failed before its answer was complete.",
        Blame.ENGINE,
        "the connection to an engine broke",
        False,
    ),
    Outcome.TIMEOUT: Ending(
        504, "The engine did not answer in time.", Blame.ENGINE, "an engine was silent", False
    ),
    Outcome.INTERNAL: Ending(
        500, "The router failed.", Blame.ROUTER, "a defect of the router; its log says where"
    ),
}
"""Every outcome."""


class EngineFailed(HexgenError):  # noqa: N818 - an answer, not a defect
    """An engine did not answer a call in full.

    Attributes:
        reason: how the call ends if nobody else answers it.
        status: HTTP status for the client.
        retry_after_s: hint for the client, seconds; ``None`` gives none.
        retryable: another engine may answer the call.
    """

    def __init__(
        self,
        reason: Outcome,
        *,
        status: int | None = None,
        retry_after_s: float | None = None,
        retryable: bool = False,
    ) -> None:
        super().__init__(reason.ending.message)
        self.retryable = retryable
        self.reason = reason
        self.status = reason.ending.status if status is None else status
        self.retry_after_s = retry_after_s


def refused(outcome: Outcome, message: str | None = None, *, retry_after_s: float = 1.0) -> Refused:
    """Return the refusal of a call that ends with ``outcome``."""
    ending = outcome.ending
    text = ending.message if message is None else message
    return Refused(text, reason=outcome.value, status=ending.status, retry_after_s=retry_after_s)


def error_response(
    message: str,
    status: int,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> web.Response:
    """Return an answer with an OpenAI error object."""
    content = error_object(message, status, param=param, code=code)
    return json_response(content, status, {"Server": SERVER, **(headers or {})})


def from_error(error: HexgenError, request_id: str | None) -> web.Response:
    """Return the answer that says what ``error`` says."""
    headers = {} if request_id is None else {REQUEST_ID_HEADER: request_id}
    if isinstance(error, BadRequest):
        return error_response(
            str(error), error.status, param=error.param, code=error.code, headers=headers
        )
    if isinstance(error, Refused):
        headers[REASON_HEADER] = error.reason
    if isinstance(error, Refused | EngineFailed):
        if error.retry_after_s is not None:
            headers["Retry-After"] = str(math.ceil(error.retry_after_s))
        return error_response(str(error), error.status, code=str(error.reason), headers=headers)
    failed = Outcome.INTERNAL.ending
    return error_response(failed.message, failed.status, code="internal_error", headers=headers)


def error_event(error: EngineFailed, path: str) -> bytes:
    """Return the event that ends a stream which broke, in the form of the endpoint ``path``."""
    content = error_object(str(error), error.status, code=str(error.reason))
    if path in ("/v1/messages", "/v1/responses"):
        named = json.dumps({"type": "error", **content})
        return f"event: error\ndata: {named}\n\n".encode()
    return f"data: {json.dumps(content)}\n\n".encode()


def as_event(body: bytes, path: str) -> bytes:
    """Return the answer ``body``, JSON, as the only event of a stream of the endpoint ``path``."""
    content = json_object(body)
    if "error" in content and path in ("/v1/messages", "/v1/responses"):
        return f"event: error\ndata: {json.dumps({'type': 'error', **content})}\n\n".encode()
    return b"data: %b\n\n" % json.dumps(content).encode()


def refused_by_engine(status: int, body: bytes | None, address: str) -> bytes:
    """Return what a client is told instead of the body of an engine's refusal, or just that body.

    Messages about the request (4xx) pass as they are, in the error object that they came in.
    What says something of the engine does not: what it says of its own failures (5xx), pages that
    are no error objects, stack traces, and its address. That is logged instead.

    Args:
        status: of the answer, 400 or more.
        body: of it; ``None`` is one that is too long to be an error object.
        address: of the engine, host and port.
    """
    error = None if body is None else _error_in(body)
    if body is not None and error is not None and status < 500 and not _tells(body, address):
        return body
    _LOG.warning("engine refused engine_url=%s status=%d said=%r", address, status, clue(body))
    return json.dumps(_with_message(error or {}, _REFUSALS.get(status), status)).encode()


def _with_message(error: dict[str, Any], message: str | None, status: int) -> dict[str, Any]:
    """Return an error object with another message and what else ``error`` may say."""
    usual = "The engine refuses it." if status < 500 else "The engine failed."
    found = error_object(message or usual, status)
    found["error"].update(_words(error))
    return found


def _words(error: dict[str, Any]) -> dict[str, int | str]:
    """Return what kind of error it is, as far as that is said in words and numbers."""
    found: dict[str, int | str] = {}
    for name in ("type", "code"):
        value = error.get(name)
        if type(value) is int or (isinstance(value, str) and _WORD.fullmatch(value)):
            found[name] = value
    return found


def clue(body: bytes | None) -> str:
    """Return what logs may say of an engine's error: its kind and size, whether it has a trace.

    Its text may repeat the prompt; whoever runs the engine finds it in the engine's own log.

    Args:
        body: what the engine said; ``None`` is more than was read.
    """
    if body is None:
        return "a long text"
    parts = [f"{name} {value}" for name, value in _words(_error_in(body) or {}).items()]
    if _TRACE.search(body) is not None:
        parts.append("Traceback")
    return ", ".join((*parts, f"{len(body)} bytes"))


def told_event(event: bytes, address: str) -> bytes:
    """Return an engine's error event as a client may see it.

    Args:
        event: whole events, of which some are errors.
        address: of the engine, host and port.
    """
    return _EVENT_DATA.sub(lambda found: _told_data(found, address), event)


def _told_data(found: re.Match[bytes], address: str) -> bytes:
    head, data = found.group(1), found.group(2)
    error = _error_in(data)
    if error is None:
        return found.group()
    code = error.get("code")
    own_failure = type(code) is int and code >= 500
    if not (own_failure or _tells(data, address) or _ADDRESS.search(data)):
        return found.group()
    _LOG.warning("engine failed engine_url=%s said=%r", address, clue(data))
    content = _with_message(error, None, code if type(code) is int else 500)
    kind = json_object(data).get("type")
    if kind is not None:
        content = {"type": kind, **content}
    return head + json.dumps(content).encode()


def _error_in(body: bytes) -> dict[str, Any] | None:
    """Return the error in an error object of any vLLM, ``None`` if ``body`` is none."""
    found = json_object(body)
    error = found.get("error")
    if isinstance(error, dict):
        return error
    if isinstance(error, str) and error:
        return {}
    old = found.get("object") == "error" and isinstance(found.get("message"), str)
    return found if old else None


def _tells(body: bytes, address: str) -> bool:
    """Whether ``body`` shows code or the engine's address."""
    return address.encode() in body or _TRACE.search(body) is not None


def hung_up(request: Request) -> web.Response:
    """Close the client's connection and return what aiohttp wants: an answer nobody gets."""
    request.hang_up()
    return web.Response(status=499)


def too_many_connections() -> web.Response:
    """Return the answer to a client that is one too many."""
    text = "The router has as many connections as it may."
    return from_error(refused(Outcome.OUT_OF_CONNECTIONS, text), None)
