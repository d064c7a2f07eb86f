"""Errors of the package.

HexgenError
├── ConfigError         a bad option, scenario or file; the message is one sentence
├── BadRequest          a client's request is wrong; carries what an OpenAI error object needs
├── Refused             the service cannot take the call now; carries a reason and a retry hint
└── UnsupportedVLLM     this vLLM cannot be driven; names the found and the supported versions
"""

from __future__ import annotations

from typing import Any, Final

_KINDS: Final = {401: "authentication_error", 429: "rate_limit_error"}


class HexgenError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(HexgenError, ValueError):
    """An option has a value that cannot work; ``str()`` is one sentence naming it."""


class BadRequest(HexgenError):  # noqa: N818 - named after the HTTP status it becomes
    """A request is malformed.

    Attributes:
        param: the field or header at fault, or ``None``.
        status: HTTP status, 400 unless the model is unknown (404) or the body too large (413).
        code: machine-readable code of the OpenAI error object.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code


class Refused(HexgenError):  # noqa: N818 - an answer, not a defect
    """No engine takes the call now.

    Attributes:
        reason: one word of the overload vocabulary, such as ``rejected-no-endpoints``.
        status: HTTP status, 503 for "nobody there", 429 for "too much work".
        retry_after_s: hint for the client, seconds.
    """

    def __init__(
        self, message: str, *, reason: str, status: int = 503, retry_after_s: float = 1.0
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.status = status
        self.retry_after_s = retry_after_s


class UnsupportedVLLM(HexgenError, RuntimeError):  # noqa: N818
    """The installed vLLM is outside the supported range or lacks a seam we need."""


def error_object(
    message: str, status: int, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return the OpenAI error object of an answer with that HTTP status."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
