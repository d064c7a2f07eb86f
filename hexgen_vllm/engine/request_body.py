"""Puts what the headers said into the JSON body of a generation request.

Prompts are long and bodies are mostly prompt, so that a body is parsed only when it brings
``vllm_xargs`` of its own. Otherwise the member is spliced in behind the opening brace: this
neither mends a malformed body nor breaks a well-formed one.

``service_tier`` ``flex`` or ``batch`` says that nobody waits for the answer; the second is not in
vLLM's list and goes on as the first.

vllm-router passes ``vllm_xargs.agentic_context`` on as a nested object, which vLLM refuses; it is
read and taken out, so that our scheduler works behind that router.
"""

from __future__ import annotations

import json
from typing import Any, Final

from hexgen_vllm import wire

MEMBER: Final = "vllm_xargs"
AGENTIC: Final = "agentic_context"
TIER: Final = "service_tier"
_BATCH_TIERS: Final = ("flex", "batch")
_BLANKS: Final = b" \t\r\n"


def with_fields(body: bytes, said: wire.CallMeta) -> bytes:
    """Return ``body`` with the fields of ``said`` among its ``vllm_xargs``.

    A body that is not a JSON object comes back as it is: vLLM has the words for what is wrong.

    Args:
        body: the whole body, JSON in any encoding JSON allows.
        said: what the headers said; a field of it wins over the body's, and a ``hexgen_*`` key
            over the body's agentic context.

    Raises:
        BadRequest: a ``hexgen_*`` key of the body is unknown or has a bad value.
    """
    mentions = MEMBER.encode() in body or TIER.encode() in body
    if mentions or json.detect_encoding(body) != "utf-8":
        return _parsed(body, said)
    ours = wire.to_xargs(said)
    return _spliced(body, ours) if ours else body


def _spliced(body: bytes, ours: dict[str, Any]) -> bytes:
    inner = body.lstrip(_BLANKS)
    if not inner.startswith(b"{"):
        return body
    rest = inner[1:].lstrip(_BLANKS)
    comma = b"" if rest.startswith(b"}") else b","
    return b'{"%s":%s' % (MEMBER.encode(), json.dumps(ours).encode()) + comma + rest


def _parsed(body: bytes, said: wire.CallMeta) -> bytes:
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
    written = wire.from_xargs(theirs)
    if document.get(TIER) in _BATCH_TIERS:
        said = wire.merged(said, wire.merged(written, wire.CallMeta(service_class=wire.BATCH)))
        document[TIER] = _BATCH_TIERS[0]
    context = theirs.get(AGENTIC)
    if isinstance(context, dict):
        theirs = {name: value for name, value in theirs.items() if name != AGENTIC}
        said = wire.merged(said, wire.merged(written, wire.from_agentic_context(context)))
    elif said == wire.CallMeta():
        return body
    return json.dumps({**document, MEMBER: {**theirs, **wire.to_xargs(said)}}).encode()
