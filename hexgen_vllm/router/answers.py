"""What clients are told when something goes wrong: OpenAI error objects, always.

Nothing here may name an engine's address or show a stack trace.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final

from aiohttp import web

from hexgen_vllm.errors import BadRequest, HexgenError, Refused
from hexgen_vllm.router.http_request import Request
from hexgen_vllm.router.outbound import REQUEST_ID_HEADER, SERVER

REASON_HEADER: Final = "x-llm-d-request-dropped-reason"
OUT_OF_CONNECTIONS: Final = "rejected-out-of-connections"
"""Reason of a refusal because the router cannot have more connections."""


class EngineFailed(HexgenError):  # noqa: N818 - an answer, not a defect
    """An engine did not answer a call in full.

    Attributes:
        reason: one word for metrics and the error's code.
        status: HTTP status for the client.
        retry_after_s: hint for the client, seconds; ``None`` gives none.
        retryable: another engine may answer the call.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        status: int = 502,
        retry_after_s: float | None = None,
        retryable: bool = False,
    ) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.reason = reason
        self.status = status
        self.retry_after_s = retry_after_s


def _kind(status: int) -> str:
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    return kinds.get(status, "invalid_request_error" if status < 500 else "server_error")


def error_object(
    message: str, status: int, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return the OpenAI error object."""
    return {"error": {"message": message, "type": _kind(status), "param": param, "code": code}}


def error_response(
    message: str,
    status: int,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> web.Response:
    """Return an answer with an OpenAI error object."""
    body = json.dumps(error_object(message, status, param=param, code=code)).encode()
    shown = {"Content-Type": "application/json", "Server": SERVER, **(headers or {})}
    return web.Response(status=status, body=body, headers=shown)


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
        return error_response(str(error), error.status, code=error.reason, headers=headers)
    return error_response("The router failed.", 500, code="internal_error", headers=headers)


def error_event(error: EngineFailed, path: str) -> bytes:
    """Return the event that ends a stream which broke, in the form of the endpoint ``path``."""
    content = error_object(str(error), error.status, code=error.reason)
    if path in ("/v1/messages", "/v1/responses"):
        named = json.dumps({"type": "error", **content})
        return f"event: error\ndata: {named}\n\n".encode()
    return f"data: {json.dumps(content)}\n\n".encode()


def refused_by_engine(status: int) -> bytes:
    """Return the body for a refusal that an engine did not put into an error object."""
    texts = {404: "The engine does not serve this endpoint.", 501: "The engine cannot do this."}
    return json.dumps(error_object(texts.get(status, "The engine refuses it."), status)).encode()


def hung_up(request: Request) -> web.Response:
    """Close the client's connection and return what aiohttp wants: an answer nobody gets."""
    request.hang_up()
    return web.Response(status=499)
