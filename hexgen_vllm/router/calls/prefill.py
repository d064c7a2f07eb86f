"""The two requests of a call whose prompt one engine computes and another one answers.

    client's request ──► prefill engine: one token, ``do_remote_decode``
                             │ its answer may say where the KV is: ``kv_transfer_params``
                             ▼
                         decode engine: the client's request, with those

That is what vLLM's connectors ask of proxies. Those of NIXL's kind say where the KV is; where
engines share storage they say nothing, and the decode engine finds the KV by the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from hexgen_vllm.router.endpoints import Endpoint

_PARAMS: Final = "kv_transfer_params"
_ASKED: Final[Mapping[str, Any]] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
# Fields that bind prompt and answer to one engine, unless they have this value.
_OFF: Final[Mapping[str, Any]] = {
    "n": 1, "best_of": 1, "echo": False, "use_beam_search": False, "prompt_logprobs": None,
    _PARAMS: None,
}  # fmt: skip
_DROPPED: Final = ("stream_options", "min_tokens")


def can_part(endpoint: Endpoint, body: Mapping[str, Any]) -> bool:
    """Return whether two engines can share a call.

    They cannot where the client wants to know of the prompt (echo, its log probabilities), wants
    several answers, sends several prompts, or says itself where KV is.

    Args:
        endpoint: where it came in.
        body: of the request; long lists may be missing in it.
    """
    return endpoint.goes_on and not _binds(body)


def _binds(body: Mapping[str, Any]) -> bool:
    if not _OFF.keys().isdisjoint(body):  # few bodies have one
        for name, off in _OFF.items():
            value = body.get(name)
            if value is not None and value != off:
                return True
    prompt = body.get("prompt")
    return isinstance(prompt, list) and len(prompt) > 1 and type(prompt[0]) is not int


def first_request(body: bytes) -> bytes | None:
    """Return the body for the prefill engine, ``None`` where that cannot be written.

    Args:
        body: for the engine that answers.
    """
    try:
        asked = json.loads(body)
        if _binds(asked):
            return None
        asked.update(stream=False, max_tokens=1, **{_PARAMS: _ASKED})
        if asked.get("max_completion_tokens") is not None:
            asked["max_completion_tokens"] = 1
        for name in _DROPPED:
            asked.pop(name, None)
        return json.dumps(asked).encode()
    except (ValueError, RecursionError):  # odd, though it could be read when it came
        return None


def second_request(body: bytes, answer: bytes) -> bytes:
    """Return the body for the engine that answers.

    Args:
        body: without the KV.
        answer: of the prefill engine; it may say where the KV is.
    """
    try:
        found = msgspec.json.decode(answer).get(_PARAMS)
        if not isinstance(found, dict):
            return body
        asked = json.loads(body)
        asked[_PARAMS] = found
        return json.dumps(asked).encode()
    except (AttributeError, ValueError, RecursionError):
        return body
