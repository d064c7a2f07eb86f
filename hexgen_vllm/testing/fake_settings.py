"""How a fake engine server behaves, how it can misbehave, and what it notes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from multidict import CIMultiDictProxy

FaultKind = Literal["reset", "hang", "close", "half", "cut", "garbage", "drip", "status"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to misbehave.

    Attributes:
        kind: ``reset`` aborts the connection, ``close`` ends it in order but early, ``half`` ends
            this direction of it only, ``cut`` ends the answer as if it were complete, ``hang``
            stops sending, ``garbage`` sends what is not HTTP, ``drip`` sends byte by byte,
            ``status`` answers with ``status``.
        after: pieces (events, or halves of a JSON body) sent before; ``None`` is before the
            response starts.
        status: status of a ``status`` fault.
        body: body of a ``status`` fault; ``None`` is an OpenAI error object.
        headers: headers of a ``status`` fault.
    """

    kind: FaultKind
    after: int | None = None
    status: int = 500
    body: bytes | None = None
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class FakeSettings:
    """How a fake engine behaves.

    Attributes:
        models: served model names.
        adapters: names of LoRA adapters of the first model, which it serves too.
        step_s: seconds a token takes.
        prefill_tokens_per_s: prompt tokens per second; 0 takes no time.
        slots: requests served at once; the others wait in order of arrival.
        cached_tokens: most prompt tokens of a request that count as cached.
        default_tokens: length of an answer that is neither forced nor cut.
        stats: what ``/hexgen/stats`` says; ``None`` is a stock engine without it.
        max_model_len: tokens of the longest prompt with its output; it is said, not checked.
        ranks: data-parallel ranks; the other settings are of each of them.
        metrics: whether it has any.
        rust: whether the server says that it is vLLM's in Rust, which has no ``/hexgen/stats``.
        event_tokens: tokens of each event of a stream, over and over; streams of chats and
            completions then say what depends on all tokens before, and token ids if asked.
        kv_transfer_params: what its answers say of KV that another engine is to get, where a
            request asks for that.
        echoes: other paths, which answer any method with what they were sent.
        policy: what ``/server_info`` says of the scheduling policy; ``None`` hides it.
    """

    models: tuple[str, ...] = ("tiny",)
    adapters: tuple[str, ...] = ()
    step_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    slots: int = 256
    cached_tokens: int = 0
    default_tokens: int = 8
    stats: dict[str, Any] | None = None
    max_model_len: int = 32768
    ranks: int = 1
    metrics: bool = True
    policy: str | None = None
    rust: bool = False
    event_tokens: tuple[int, ...] = ()
    kv_transfer_params: dict[str, Any] | None = None
    echoes: tuple[str, ...] = ()

    @property
    def served(self) -> tuple[str, ...]:
        """Names that calls may use."""
        return (*self.models, *self.adapters)

    def cards(self) -> list[dict[str, Any]]:
        """Return the entries of ``/v1/models``; adapters name a parent and no length."""
        models = [{"id": name, "object": "model", "parent": None,
                   "max_model_len": self.max_model_len} for name in self.models]  # fmt: skip
        parent = {"object": "model", "parent": self.models[0], "max_model_len": None}
        return [*models, *({"id": name, **parent} for name in self.adapters)]


@dataclass(frozen=True, slots=True)
class Received:
    """A request as it arrived."""

    method: str
    path: str
    headers: CIMultiDictProxy[str]
    body: bytes
