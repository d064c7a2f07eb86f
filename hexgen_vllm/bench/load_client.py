"""One OpenAI endpoint as the bench sees it: which model, how long, and one call at a time."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from hexgen_vllm import wire
from hexgen_vllm.bench.text import PromptSource
from hexgen_vllm.clock import Clock
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.router.http.errors import why
from hexgen_vllm.sim.workloads.workload import CallSpec

ENGINE_HEADER: Final = "x-hexgen-engine"
START_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one call; fields as in :class:`hexgen_vllm.records.CallRecord`."""

    latency_s: float
    ttft_s: float | None = None
    output_tokens: int = 0
    engine: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """A served model; ``max_tokens`` is its context length, ``None`` when not said."""

    name: str
    max_tokens: int | None = None


async def find_model(session: aiohttp.ClientSession, url: str, wanted: str | None) -> Model:
    """Return the model called ``wanted`` at ``url``, or the first one when ``None``.

    Raises:
        ConfigError: the endpoint does not answer, or serves no such model.
    """
    try:
        timeout = aiohttp.ClientTimeout(total=START_TIMEOUT_S)
        async with session.get(f"{url}/v1/models", timeout=timeout) as response:
            response.raise_for_status()
            served = [_model(entry) for entry in (await response.json())["data"]]
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
        raise ConfigError(f"{url} cannot be used: {_words(error)}.") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{url}/v1/models did not answer with a list of models.") from None
    names = ", ".join(model.name for model in served) or "none"
    found = [model for model in served if wanted in (None, model.name)]
    if not found:
        raise ConfigError(f"{url} does not serve {wanted or 'any model'}; it serves {names}.")
    return found[0]


def _model(entry: dict[str, Any]) -> Model:
    length = entry.get("max_model_len")
    return Model(str(entry["id"]), length if isinstance(length, int) else None)


@dataclass(frozen=True, slots=True)
class LoadClient:
    """Sends calls with forced output lengths, so that every policy does the same work.

    Attributes:
        session: what to send with; closed by whoever opened it.
        url: base URL without ``/v1``.
        model: served model name.
        prompts: where prompts come from.
        clock: what latencies are measured with.
        stream: ask for a stream, which is what gives a time to first token.
        chat: send text to ``/v1/chat/completions`` instead of token ids to ``/v1/completions``.
        agentic_context: tell of workflows in the body, too, as vllm-router reads it.
    """

    session: aiohttp.ClientSession
    url: str
    model: str
    prompts: PromptSource
    clock: Clock
    stream: bool = True
    chat: bool = False
    agentic_context: bool = False

    async def send(
        self, workflow_id: str, index: int, call: CallSpec, meta: wire.CallMeta
    ) -> Reply:
        """Send one call and wait for its end; failures come back as ``error``."""
        content = self._body(workflow_id, index, call)
        if self.agentic_context:
            content["vllm_xargs"] = {"agentic_context": _agentic_context(meta)}
        body = json.dumps(content, separators=(",", ":"))
        headers = {"Content-Type": "application/json", **wire.to_headers(meta)}
        path = "/v1/chat/completions" if self.chat else "/v1/completions"
        sent_s = self.clock.now()
        reading = _Reading(self.clock)
        engine = None
        try:
            async with self.session.post(
                self.url + path, data=body.encode(), headers=headers
            ) as response:
                engine = response.headers.get(ENGINE_HEADER)
                await reading.read(response, stream=self.stream)
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
            reading.error = _words(error)
        first_s = reading.first_s
        return Reply(
            latency_s=self.clock.now() - sent_s,
            ttft_s=None if first_s is None else first_s - sent_s,
            output_tokens=reading.output_tokens or 0,
            engine=engine,
            error=reading.error or _wrong_length(call.output_tokens, reading.output_tokens),
        )

    def _body(self, workflow_id: str, index: int, call: CallSpec) -> dict[str, object]:
        body: dict[str, object] = {
            "model": self.model,
            "max_tokens": call.output_tokens,
            "min_tokens": call.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
        }
        if self.chat:
            text = self.prompts.text(workflow_id, index, call)
            body["messages"] = [{"role": "user", "content": text}]
        else:
            body["prompt"] = self.prompts.token_ids(workflow_id, index, call)
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body


def _agentic_context(meta: wire.CallMeta) -> dict[str, object]:
    said = {
        "program_id": meta.workflow_id,
        "task_id": meta.workflow_id,
        "agent_role": meta.stage,
        "deadline_seconds": None
        if meta.workflow_deadline_ms is None
        else meta.workflow_deadline_ms / 1000.0,
        "expected_output_length": meta.expected_output_tokens,
    }
    return {name: value for name, value in said.items() if value is not None}


class _Reading:
    """Reads one response; chunks between the first and the last are hardly looked at."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.first_s: float | None = None
        self.output_tokens: int | None = None
        self.error: str | None = None

    async def read(self, response: aiohttp.ClientResponse, *, stream: bool) -> None:
        if response.status != 200:
            self.error = f"HTTP {response.status}: {_message(await response.text())}"
        elif stream:
            await self._events(response)
        else:
            self._usage(_object(await response.read()))

    async def _events(self, response: aiohttp.ClientResponse) -> None:
        done = False
        async for line in response.content:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                done = True
            elif self.first_s is None or b'"usage"' in data or b'"error"' in data:
                self._event(_object(data))
        if self.error is None and not done:
            self.error = "the stream ended early"

    def _event(self, event: dict[str, Any]) -> None:
        if event.get("error"):
            self.error = _message(json.dumps(event))
        if event.get("choices") and self.first_s is None:
            self.first_s = self._clock.now()
        self._usage(event)

    def _usage(self, body: dict[str, Any]) -> None:
        usage = body.get("usage")
        if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
            self.output_tokens = usage["completion_tokens"]


def _object(data: bytes) -> dict[str, Any]:
    found = wire.from_json(data)
    if not isinstance(found, dict):
        raise ValueError("the answer is not a JSON object")
    return found


def _wrong_length(expected: int, found: int | None) -> str | None:
    """Return what is wrong with an answer's length; not said is not wrong."""
    if found in (None, expected):
        return None
    return f"{found} output tokens instead of {expected}"


def _message(text: str) -> str:
    """Return the message of an OpenAI error object, or the text itself, in one short line."""
    try:
        error = wire.from_json(text)["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(text.split())[:200] or "no message"


def _words(error: BaseException) -> str:
    """Return an exception in one short line."""
    if isinstance(error, asyncio.TimeoutError):
        return "timed out"
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.strerror:
        return why(error.os_error)
    return f"{type(error).__name__}: {_message(str(error))}".rstrip(".")
