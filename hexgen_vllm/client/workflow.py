"""One workflow: an identity and a deadline that all its calls carry."""

from __future__ import annotations

import math
import uuid
from dataclasses import replace
from typing import Any, Final, Generic, Literal, Protocol, TypeVar, cast, overload

from hexgen_vllm import wire
from hexgen_vllm.client import retries
from hexgen_vllm.client import scope as scopes
from hexgen_vllm.client.finish import finish, finish_async, finish_via, finish_via_async
from hexgen_vllm.client.scope import Calls, Scope, checked
from hexgen_vllm.client.stage import StageClient
from hexgen_vllm.clock import Clock, SystemClock
from hexgen_vllm.errors import ConfigError


class _Chats(Protocol):
    @property
    def chat(self) -> Any: ...


class _Completes(Protocol):
    @property
    def completions(self) -> Any: ...


class _Responds(Protocol):
    @property
    def responses(self) -> Any: ...


class _Messages(Protocol):
    @property
    def messages(self) -> Any: ...


class _Embeds(Protocol):
    @property
    def embeddings(self) -> Any: ...


ClientT = TypeVar(
    "ClientT", bound=_Chats | _Completes | _Responds | _Messages | _Embeds | StageClient
)
"""A client of an SDK; :class:`StageClient` where a workflow has none."""
WorkflowT = TypeVar("WorkflowT", bound="Workflow[Any]")

LATE: Final = ("send", "raise")
_RESOURCES: Final = ("chat", "completions", "responses", "messages", "embeddings")
# One clock for the process: scopes compare deadlines, and two clocks do not compare.
_CLOCK: Final = SystemClock()


class Workflow(Generic[ClientT]):
    """Adds workflow headers to the calls of an OpenAI client, until it is left.

    Use it with ``async with`` or ``with``. Opened inside another workflow it is a part of it: same
    id, type and tenant unless given, and the tighter of the two deadlines. Leaving it tells the
    router that the workflow has ended, unless the last call said so; a server that does not answer
    costs 2 s at most.

    Args:
        client: an ``openai.AsyncOpenAI``, ``openai.OpenAI``, a client of Anthropic or anything with
            their methods; none where calls are made by an object with
            :func:`~hexgen_vllm.client.http_client`.
        deadline_s: seconds from entering until the whole workflow must be done; none by default.
        type: name under which the shape of such workflows is learned.
        workflow_id: up to 128 printable characters; made up by default. One that differs from the
            enclosing workflow's makes this a workflow of its own.
        tenant: who pays.
        late: what a call does when the deadline has passed: ``send`` it with 1 ms left, or
            ``raise`` :class:`DeadlineExceeded` without sending it.
        clock: where time comes from; for tests.

    Raises:
        ConfigError: an argument is not legal.
    """

    @overload
    def __init__(
        self: Workflow[StageClient],
        client: None = None,
        *,
        deadline_s: float | None = None,
        type: str | None = None,
        workflow_id: str | None = None,
        tenant: str | None = None,
        late: Literal["send", "raise"] = "send",
        clock: Clock | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self,
        client: ClientT,
        *,
        deadline_s: float | None = None,
        type: str | None = None,
        workflow_id: str | None = None,
        tenant: str | None = None,
        late: Literal["send", "raise"] = "send",
        clock: Clock | None = None,
    ) -> None: ...

    def __init__(
        self,
        client: Any = None,
        *,
        deadline_s: float | None = None,
        type: str | None = None,
        workflow_id: str | None = None,
        tenant: str | None = None,
        late: Literal["send", "raise"] = "send",
        clock: Clock | None = None,
    ) -> None:
        if deadline_s is not None:
            deadline_s = scopes.checked_deadline_s(deadline_s)
        if late not in LATE:
            raise ConfigError(f"late must be one of {', '.join(LATE)}, not {late!r}.")
        self._said = checked(
            wire.CallMeta(workflow_id=workflow_id, workflow_type=type, tenant=tenant)
        )
        if client is not None and not _is_known(client):
            raise ConfigError(
                f"client must be one of openai or anthropic, or have their methods, and "
                f"{client.__class__.__name__} has not; for other libraries leave it out and give "
                f"them hexgen_vllm.client.http_client()."
            )
        self._client = client
        self._deadline_s = deadline_s
        self._late = late
        self._clock = clock
        self._scope: Scope | None = None
        self._is_part = False
        self._is_left = False
        self._mark: str | None = None

    @property
    def id(self) -> str:
        """The workflow's id."""
        return self._entered().workflow_id

    @property
    def slack_s(self) -> float | None:
        """Seconds that the workflow has to spare, as the router said with its last answer.

        Negative when it is going to be late; ``None`` as long as nothing was said, or when calls
        are not made through :func:`~hexgen_vllm.client.http_client`.
        """
        return self._entered().calls.slack_s

    @property
    def open_scope(self) -> Scope | None:
        """What calls inherit from it, ``None`` before it is entered and after it was left."""
        return None if self._is_left else self._scope

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline: ``inf`` when there is none, negative once it has passed."""
        return self._entered().remaining_s()

    def stage(
        self,
        name: str,
        *,
        expected_output_tokens: int | None = None,
        stages_left: int | None = None,
        final: bool | None = None,
    ) -> ClientT:
        """Return the client, with every call counted as the stage ``name``.

        Args:
            name: up to 64 characters of ``[A-Za-z0-9_.:/-]``.
            expected_output_tokens: how long answers will be, if known.
            stages_left: how many stages follow, if known.
            final: whether nothing follows the next call.

        Raises:
            ConfigError: an argument is not legal, or the workflow is not open.
        """
        meta = self._meta(name, expected_output_tokens, stages_left, final)
        inner = replace(self._entered(), stage=meta.stage or "", outer=None)
        return cast("ClientT", StageClient(self._client, lambda: self._marked(meta), inner))

    def headers(
        self,
        stage: str | None = None,
        *,
        expected_output_tokens: int | None = None,
        stages_left: int | None = None,
        final: bool | None = None,
    ) -> dict[str, str]:
        """Return the headers of one call made now, for use with any other HTTP library.

        Raises:
            ConfigError: an argument is not legal, or the workflow is not open.
            DeadlineExceeded: the deadline has passed and ``late`` is ``raise``.
        """
        return self._headers(self._meta(stage, expected_output_tokens, stages_left, final))

    def __enter__(self: WorkflowT) -> WorkflowT:
        self._enter()
        return self

    def __exit__(self, *_: object) -> None:
        if workflow_id := self._leave():
            if self._client is None:
                finish_via(self._entered().calls.via)
            else:
                finish(self._client, workflow_id, self._entered().tenant)

    async def __aenter__(self: WorkflowT) -> WorkflowT:
        self._enter()
        return self

    async def __aexit__(self, *_: object) -> None:
        if workflow_id := self._leave():
            if self._client is None:
                await finish_via_async(self._entered().calls.via)
            else:
                await finish_async(self._client, workflow_id, self._entered().tenant)

    def _enter(self) -> None:
        if self._scope is not None:
            raise ConfigError("a Workflow can be entered only once.")
        around, said = scopes.current(), self._said
        self._is_part = around is not None and said.workflow_id in (None, around.workflow_id)
        outer = around if around is not None and self._is_part else None
        clock = around.clock if around else self._clock or _CLOCK
        limit_s = math.inf if self._deadline_s is None else clock.now() + self._deadline_s
        self._scope = scopes.enter(
            Scope(
                workflow_id=outer.workflow_id if outer else said.workflow_id or uuid.uuid4().hex,
                clock=clock,
                deadline_s=min(limit_s, around.deadline_s if around else math.inf),
                type=said.workflow_type or (outer.type if outer else None),
                tenant=said.tenant or (around.tenant if around else None),
                stage=outer.stage if outer else "",
                raises=self._late == "raise",
                calls=outer.calls if outer else Calls(),
            )
        )
        self._mark = retries.follow(self._client, self._scope)

    def _leave(self) -> str | None:
        """Close the scope; return the id of a workflow whose end nobody has announced."""
        scope = self._entered()
        scopes.leave(scope)
        self._is_left = True
        scope.calls.ended = not self._is_part
        retries.forget(self._mark)
        return scope.workflow_id if scope.calls.open_end and not self._is_part else None

    def _entered(self) -> Scope:
        if self._scope is None:
            raise ConfigError("a Workflow must be entered (with, async with) before it is used.")
        return self._scope

    def _meta(
        self, stage: str | None, expected: int | None, stages_left: int | None, final: bool | None
    ) -> wire.CallMeta:
        """Return what all calls of a stage say; the deadline is added to each when it is made."""
        scope = self._entered()
        around = scopes.current()
        if stage and around is not None and around.workflow_id == scope.workflow_id:
            stage = around.within(stage)
        return checked(
            wire.CallMeta(
                workflow_id=scope.workflow_id,
                workflow_type=scope.type,
                stage=stage,
                stages_left=stages_left,
                expected_output_tokens=expected,
                workflow_final=final,
                tenant=scope.tenant,
            )
        )

    def _marked(self, meta: wire.CallMeta) -> dict[str, str]:
        headers = self._headers(meta)
        return headers if self._mark is None else {**headers, retries.MARK: self._mark}

    def _headers(self, meta: wire.CallMeta) -> dict[str, str]:
        scope = self._entered()
        scope.check_late()
        scope.calls.open_end = not meta.workflow_final
        return wire.to_headers(replace(meta, workflow_deadline_ms=scope.remaining_ms()))


def _is_known(client: object) -> bool:
    """Return whether ``client`` has resources whose methods take headers, as those of SDKs do."""
    found = (getattr(client, name, None) for name in _RESOURCES)
    return any(hasattr(one, "create") or hasattr(one, "completions") for one in found)
