"""What a call inherits from where it is made: workflow, deadline, enclosing stage.

Scopes are linked from inner to outer and held in a context variable, so that tasks started inside
a workflow see it and tasks beside it do not.
"""

from __future__ import annotations

import math
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Final

from hexgen_vllm import wire
from hexgen_vllm.clock import Clock
from hexgen_vllm.errors import BadRequest, ConfigError, HexgenError

MIN_REMAINING_MS: Final = 1.0  # what is sent once the deadline has passed


class DeadlineExceeded(HexgenError, TimeoutError):  # noqa: N818 - named after what happened
    """The workflow's deadline has passed, so the call was not sent."""


@dataclass(frozen=True, slots=True)
class Via:
    """A way to the server of the last call: an HTTP client, what to ask, and with which headers."""

    client: Any
    url: str
    headers: dict[str, str]
    is_async: bool


@dataclass(slots=True)
class Calls:
    """What the calls of a workflow, those of its parts included, have said of its end."""

    open_end: bool = False  # a call was made, and none since said that it is the last
    ended: bool = False  # the workflow was left
    via: Via | None = None  # how the end is announced where the workflow has no client
    slack_s: float | None = None  # how the workflow stands, as the last answer that says so says


@dataclass(frozen=True, slots=True)
class Scope:
    """One open workflow or stage.

    Attributes:
        workflow_id: sent with every call.
        clock: what ``deadline_s`` is measured on; inner scopes use the same one.
        deadline_s: moment on ``clock`` by which the workflow must end, ``inf`` when none.
        type: type of workflow, ``None`` when not said.
        tenant: who pays, ``None`` when not said.
        stage: name of the enclosing stage, "" when there is none.
        raises: whether a call after the deadline is an error here instead of being sent.
        calls: shared by the scopes of one workflow.
        outer: the scope around this one.
    """

    workflow_id: str
    clock: Clock
    deadline_s: float = math.inf
    type: str | None = None
    tenant: str | None = None
    stage: str = ""
    raises: bool = False
    calls: Calls = field(default_factory=Calls, compare=False)
    outer: Scope | None = field(default=None, repr=False, compare=False)

    def remaining_s(self) -> float:
        """Return seconds until the deadline: ``inf`` when there is none, negative when passed."""
        return self.deadline_s - self.clock.now()

    def remaining_ms(self) -> float | None:
        """Return the milliseconds to send: at least 1, ``None`` when there is no deadline."""
        if math.isinf(self.deadline_s):
            return None
        return max(self.remaining_s() * 1000.0, MIN_REMAINING_MS)

    def check_late(self) -> None:
        """Raise :class:`DeadlineExceeded` if the deadline has passed and that is an error."""
        if self.raises and self.remaining_s() <= 0:
            raise DeadlineExceeded(
                f"the deadline of workflow {self.workflow_id} passed "
                f"{-self.remaining_s():.3f} s ago."
            )

    def meta(self) -> wire.CallMeta:
        """Return what all calls here say; the deadline is added to each when it is made."""
        return wire.CallMeta(
            workflow_id=self.workflow_id, workflow_type=self.type, tenant=self.tenant
        )

    def within(self, stage: str) -> str:
        """Return the full name of ``stage`` here: ``outer/inner`` inside an open stage."""
        return f"{self.stage}/{stage}" if self.stage else stage


_current: ContextVar[Scope | None] = ContextVar("hexgen_scope", default=None)


def current() -> Scope | None:
    """Return the innermost open scope of this task or thread.

    A generator that was never finished, or a task that outlives its workflow, may still be within
    one that has ended: that is none.
    """
    scope = _current.get()
    while scope is not None and scope.calls.ended:
        scope = scope.outer
    return scope


def enter(scope: Scope) -> Scope:
    """Open ``scope`` inside the current one and return it as linked."""
    linked = replace(scope, outer=current())
    _current.set(linked)
    return linked


def leave(scope: Scope) -> None:
    """Close ``scope``, in another task there is nothing to close.

    It need not be the innermost one: generators share the context of whoever runs them, and may
    end in any order.
    """
    within, inner = [], _current.get()
    while inner is not None and inner != scope:
        within.append(inner)
        inner = inner.outer
    if inner is None:
        return
    left = inner.outer
    for one in reversed(within):
        left = replace(one, outer=left)
    _current.set(left)


def checked(meta: wire.CallMeta) -> wire.CallMeta:
    """Return ``meta`` if a server will accept it.

    Raises:
        ConfigError: it will not; names the field.
    """
    try:
        return wire.from_xargs(wire.to_xargs(meta))
    except BadRequest as error:
        raise ConfigError(str(error).removeprefix(wire.XARGS_PREFIX)) from None


def checked_deadline_s(deadline_s: float) -> float:
    """Return ``deadline_s`` if a server will accept it.

    Raises:
        ConfigError: it will not.
    """
    try:
        said = float(deadline_s)
    except (TypeError, ValueError, OverflowError):
        said = math.nan
    if not 0 < said <= wire.MAX_TIME_MS / 1000.0:
        raise ConfigError(
            f"deadline_s must be a number of seconds above 0 and up to 1e9, not {deadline_s!r}."
        )
    return said
