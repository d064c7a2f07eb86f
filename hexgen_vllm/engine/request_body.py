"""Puts what the headers said into the JSON body of a generation request.

Prompts are long and bodies are mostly prompt, so that a body is parsed only when it brings
``vllm_xargs`` of its own. Otherwise the member is spliced in behind the opening brace: this
neither mends a malformed body nor breaks a well-formed one.
"""

from __future__ import annotations

import json
from typing import Any, Final

from hexgen_vllm import wire

MEMBER: Final = "vllm_xargs"
_BLANKS: Final = b" \t\r\n"


def with_fields(body: bytes, said: wire.CallMeta) -> bytes:
    """Return ``body`` with the fields of ``said`` among its ``vllm_xargs``.

    A body that is not a JSON object comes back as it is: vLLM has the words for what is wrong.

    Args:
        body: the whole body, JSON in any encoding JSON allows.
        said: what the headers said; a field of it wins over the body's.

    Raises:
        BadRequest: a ``hexgen_*`` key of the body is unknown or has a bad value.
    """
    ours = wire.to_xargs(said)
    if MEMBER.encode() in body or json.detect_encoding(body) != "utf-8":
        return _parsed(body, ours)
    return _spliced(body, ours) if ours else body


def _spliced(body: bytes, ours: dict[str, Any]) -> bytes:
    inner = body.lstrip(_BLANKS)
    if not inner.startswith(b"{"):
        return body
    rest = inner[1:].lstrip(_BLANKS)
    comma = b"" if rest.startswith(b"}") else b","
    return b'{"%s":%s' % (MEMBER.encode(), json.dumps(ours).encode()) + comma + rest


def _parsed(body: bytes, ours: dict[str, Any]) -> bytes:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return body
    if not isinstance(document, dict):
        return body
    theirs = document.get(MEMBER)
    if theirs is None:
        theirs = {}
    if not isinstance(theirs, dict):
        return body
    wire.from_xargs(theirs)
    if not ours:
        return body
    return json.dumps({**document, MEMBER: {**theirs, **ours}}).encode()
