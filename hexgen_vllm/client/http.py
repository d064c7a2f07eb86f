"""HTTP clients of httpx whose requests carry the workflow that they are made in.

    from hexgen_vllm.client import Workflow, http_client

    llm = ChatOpenAI(base_url=..., http_client=http_client(), http_async_client=async_http_client())
    with Workflow(deadline_s=30, type="text2sql") as workflow:
        with workflow.stage("plan"):
            llm.invoke("...")

The headers are made when a request is sent, so those of a retry say what is left then. It works
under everything that takes an ``httpx`` client: the SDKs of OpenAI and Anthropic, LangChain,
LlamaIndex, OpenAI Agents. Nothing here imports any of them before it is asked for.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Literal, overload

from hexgen_vllm import wire
from hexgen_vllm.client import scope as scopes
from hexgen_vllm.client.finish import finish_url
from hexgen_vllm.client.scope import Scope, Via
from hexgen_vllm.client.workflow import Workflow
from hexgen_vllm.errors import ConfigError

if TYPE_CHECKING:
    import anthropic
    import openai

SDKS: Final = ("openai", "anthropic")
_ID: Final = wire.header_name("workflow_id")
_STAGE: Final = wire.header_name("stage")
_DEADLINE: Final = wire.header_name("workflow_deadline_ms")
_SAID: Final = ("authorization", "x-api-key", "api-key", wire.header_name("tenant"))
_FINISH: Final = "/finish_session"
_ENDPOINTS: Final = {
    "/chat/completions": "chat", "/completions": "completion", "/responses": "response",
    "/messages": "chat", "/embeddings": "embedding", "/rerank": "rerank", "/score": "score",
}  # fmt: skip
_HASHED_CHARS: Final = 200  # of instructions: what follows is often about the one question


@overload
def http_client(
    workflow: Workflow[Any] | None = None,
    *,
    sdk: Literal["openai"] | None = None,
    **options: Any,
) -> openai.DefaultHttpxClient: ...


@overload
def http_client(
    workflow: Workflow[Any] | None = None, *, sdk: Literal["anthropic"], **options: Any
) -> anthropic.DefaultHttpxClient: ...


def http_client(
    workflow: Workflow[Any] | None = None, *, sdk: str | None = None, **options: Any
) -> Any:
    """Return an ``httpx.Client`` whose requests carry a workflow.

    Args:
        workflow: the one; by default the one that a request is made in, if any.
        sdk: package whose client it is for, ``openai`` or ``anthropic``: it decides between httpx
            and httpx2, and on timeouts. By default the first that is installed.
        options: of the client, as ``verify`` or ``timeout``.

    Raises:
        ConfigError: there is no such package, or ``workflow`` is none.
    """
    return _client("DefaultHttpxClient", "Client", _Stamp(workflow), sdk, options)


@overload
def async_http_client(
    workflow: Workflow[Any] | None = None,
    *,
    sdk: Literal["openai"] | None = None,
    **options: Any,
) -> openai.DefaultAsyncHttpxClient: ...


@overload
def async_http_client(
    workflow: Workflow[Any] | None = None, *, sdk: Literal["anthropic"], **options: Any
) -> anthropic.DefaultAsyncHttpxClient: ...


def async_http_client(
    workflow: Workflow[Any] | None = None, *, sdk: str | None = None, **options: Any
) -> Any:
    """Return an ``httpx.AsyncClient`` whose requests carry a workflow; see :func:`http_client`."""
    return _client("DefaultAsyncHttpxClient", "AsyncClient", _AsyncStamp(workflow), sdk, options)


class WorkflowTransport:
    """A transport around another, for a client of httpx that is made elsewhere.

    Args:
        base: the transport that sends, such as ``httpx.HTTPTransport()``.
        workflow: whose requests these are; by default the one that a request is made in.
    """

    def __init__(self, base: Any, workflow: Workflow[Any] | None = None) -> None:
        self._base = base
        self._stamp = _Stamp(workflow)

    def handle_request(self, request: Any) -> Any:
        """Send ``request`` with the headers of its workflow."""
        self._stamp.client = _Bare(self._base, type(request))
        self._stamp.on_request(request)
        response = self._base.handle_request(request)
        self._stamp.note(response.headers)
        return response

    def close(self) -> None:
        """Close the transport that sends."""
        self._base.close()

    def __enter__(self) -> WorkflowTransport:
        self._base.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._base.__exit__(*details)


class AsyncWorkflowTransport:
    """The same around an asynchronous transport, such as ``httpx.AsyncHTTPTransport()``."""

    def __init__(self, base: Any, workflow: Workflow[Any] | None = None) -> None:
        self._base = base
        self._stamp = _AsyncStamp(workflow)

    async def handle_async_request(self, request: Any) -> Any:
        """Send ``request`` with the headers of its workflow."""
        self._stamp.client = _AsyncBare(self._base, type(request))
        await self._stamp.on_request(request)
        response = await self._base.handle_async_request(request)
        self._stamp.note(response.headers)
        return response

    async def aclose(self) -> None:
        """Close the transport that sends."""
        await self._base.aclose()

    async def __aenter__(self) -> AsyncWorkflowTransport:
        await self._base.__aenter__()
        return self

    async def __aexit__(self, *details: Any) -> None:
        await self._base.__aexit__(*details)


class _Stamping:
    """Puts headers on requests, and reads what answers say."""

    is_async = False

    def __init__(self, workflow: Workflow[Any] | None) -> None:
        if workflow is not None and not isinstance(workflow, Workflow):
            raise ConfigError(
                f"workflow must be a Workflow of hexgen_vllm.client, not {type(workflow).__name__}."
            )
        self._workflow = workflow
        self.client: Any = None

    def stamp(self, request: Any) -> None:
        """Put the headers of the workflow on ``request``; those that the caller gave stay.

        The deadline is what is left now, whatever an earlier try of the same call said.

        Raises:
            DeadlineExceeded: it has passed, and the workflow wants to know.
        """
        scope = self.scope()
        path = request.url.path
        given: Any = request.headers
        if scope is None or path.endswith(_FINISH) or request.method != "POST":
            return
        if given.get(_ID, scope.workflow_id) != scope.workflow_id:
            return  # another's, by its own headers
        scope.check_late()
        stage = given.get(_STAGE) or scope.stage or inferred_stage(path, request)
        meta = replace(scope.meta(), stage=stage or None, workflow_deadline_ms=scope.remaining_ms())
        for name, value in wire.to_headers(meta).items():
            if name == _DEADLINE or name not in given:
                given[name] = value
        scope.calls.open_end = given.get(wire.header_name("workflow_final")) != "1"
        root, version, _ = str(request.url).partition("/v1/")
        if version:
            headers = {name: given[name] for name in _SAID if name in given}
            url = finish_url(root, scope.workflow_id)
            scope.calls.via = Via(self.client, url, headers, self.is_async)

    def note(self, headers: Mapping[str, str]) -> None:
        """Read from an answer how the workflow stands."""
        scope = self.scope()
        said = headers.get(wire.SLACK_HEADER)
        if scope is not None and said is not None:
            with suppress(ValueError):
                scope.calls.slack_s = float(said) / 1000.0

    def scope(self) -> Scope | None:
        """Return where a request is made: a stage of the workflow, the workflow, or nowhere."""
        current = scopes.current()
        if self._workflow is None:
            return current
        own = self._workflow.open_scope
        if current is None or own is None or current.workflow_id != own.workflow_id:
            return own
        return current


class _Stamp(_Stamping):
    def on_request(self, request: Any) -> None:
        self.stamp(request)

    def on_response(self, response: Any) -> None:
        self.note(response.headers)


class _AsyncStamp(_Stamping):
    is_async = True

    async def on_request(self, request: Any) -> None:
        self.stamp(request)

    async def on_response(self, response: Any) -> None:
        self.note(response.headers)


class _Bare:
    """What ends a workflow where there is a transport only."""

    def __init__(self, base: Any, request: Any) -> None:
        self._base = base
        self._request = request

    def post(self, url: str, *, headers: dict[str, str], timeout: float) -> None:
        asked = self._request("POST", url, headers=headers, extensions=_timeouts(timeout))
        self._base.handle_request(asked).close()


class _AsyncBare(_Bare):
    async def post(  # type: ignore[override]
        self, url: str, *, headers: dict[str, str], timeout: float
    ) -> None:
        asked = self._request("POST", url, headers=headers, extensions=_timeouts(timeout))
        await (await self._base.handle_async_request(asked)).aclose()


def _timeouts(timeout: float) -> dict[str, Any]:
    return {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), timeout)}


def inferred_stage(path: str, request: Any) -> str:
    """Return a stage for a call that names none, out of its structure.

    Calls with the same instructions and tools are the same stage; what follows the result of a
    tool is another one. Of the instructions, digits and what comes late do not count: those are
    often about the one question.

    Args:
        path: of the request's URL.
        request: of httpx, with a body in JSON.
    """
    kind = next((name for end, name in _ENDPOINTS.items() if path.endswith(end)), "")
    if not kind:
        return ""
    try:
        body = json.loads(request.content)
        messages = body.get("messages") or body.get("input") or ()
        tools = [_name(tool) for tool in body.get("tools") or ()]
        said = _text(body.get("system") or body.get("instructions") or _instructions(messages))
        last = messages[-1] if isinstance(messages, list) and messages else {}
    except Exception:  # no JSON, a stream, or of another shape
        return kind
    fixed = re.sub(r"[\d\s]+", " ", said)[:_HASHED_CHARS]
    if fixed or tools:
        kind += f"-{zlib.crc32(f'{fixed}/{sorted(tools)}'.encode()):08x}"
    return f"{kind}-tool" if _is_result(last) else kind


def _instructions(messages: Any) -> Any:
    first = messages[0] if isinstance(messages, list) and messages else {}
    is_system = isinstance(first, dict) and first.get("role") in ("system", "developer")
    return first.get("content") if is_system else ""


def _text(content: Any) -> str:
    if isinstance(content, list):
        return " ".join(_text(part.get("text")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _name(tool: Any) -> str:
    return str(tool.get("name") or (tool.get("function") or {}).get("name") or tool.get("type"))


def _is_result(message: Any) -> bool:
    if not isinstance(message, dict):
        return False
    kinds = {message.get("role"), message.get("type")}
    content = message.get("content")
    if isinstance(content, list):
        kinds |= {part.get("type") for part in content if isinstance(part, dict)}
    return not kinds.isdisjoint({"tool", "function_call_output", "tool_result", "function"})


def _client(default: str, plain: str, stamp: Any, sdk: str | None, options: dict[str, Any]) -> Any:
    hooks = {name: list(found) for name, found in (options.pop("event_hooks", None) or {}).items()}
    hooks["request"] = [*hooks.get("request", ()), stamp.on_request]
    hooks["response"] = [stamp.on_response, *hooks.get("response", ())]
    stamp.client = _made_by(default, plain, sdk)(event_hooks=hooks, **options)
    return stamp.client


def _made_by(default: str, plain: str, sdk: str | None) -> Any:
    """Return the class of client that the SDK wants."""
    if sdk is not None and sdk not in SDKS:
        raise ConfigError(f"sdk must be one of {', '.join(SDKS)}, not {sdk!r}.")
    for name in (sdk,) if sdk else SDKS:
        with suppress(ModuleNotFoundError, AttributeError):
            return getattr(import_module(name), default)
    if sdk is None:
        for name in ("httpx", "httpx2"):
            with suppress(ModuleNotFoundError):
                return getattr(import_module(name), plain)
    raise ConfigError(f"{sdk or 'httpx'} is not installed.")
