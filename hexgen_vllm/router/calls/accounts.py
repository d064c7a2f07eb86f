"""Where the time of a workflow went: an account of its calls, kept for a while after its end.

The time between its first call and its last end is divided along the path that decided it: from
the call that ended last back to the latest end before that call came, and so on. What lies
between two such calls is the client's. No account has any text of a prompt or an answer.

Where the router tunes itself, accounts of workflows that ended are what it plays again.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hexgen_vllm.policy.workflow import WorkflowRun
from hexgen_vllm.recent import RecentCall, RecentWorkflow, Ring
from hexgen_vllm.router.errors import Outcome
from hexgen_vllm.router.observe.ledger import ON_TIME, outcome
from hexgen_vllm.types import LONE, NO_DEADLINE, Call

if TYPE_CHECKING:
    from hexgen_vllm.router.calls.call import Job

PARTS: Final = ("queue", "retries", "prefill", "decode", "engine", "client")
"""What time can go to: waiting in the router; tries that failed; from sending to the first token,
waiting in the engine included; from there to the end; the last two together where the answer was
no stream; and what passed between calls."""
REASONS: Final[Mapping[str, str]] = {
    "marginal_cost": "the call costs all open workflows the least there",
    "finish": "it is predicted to end first there",
    "paper_score": "it has the best score of the paper's rule",
    "turn": "it was its turn",
    "fewest_calls": "it had the fewest calls for its speed",
    "fewest_tokens": "it had the fewest tokens to do",
    "fewest_blocks": "it had the fewest KV blocks to come",
    "prefix": "it has most of the prompt cached",
    "weighted_score": "it has the best weighted score",
    "home": "the workflow is at home there",
    "new_home": "it was the least busy, and is now the workflow's home",
    "outside": "a policy from a file chose it",
    "stored": "it has the stored response",
    "least-busy": "it was the least busy",
}
"""What a placement's reason means, as the end of a sentence."""
OPEN: Final = "open"
_MAX_CALLS: Final = 256
_MOST: Final = 1_000
_LOG: Final = logging.getLogger("hexgen_vllm.router.workflow")


@dataclass(init=False, slots=True)
class CallAccount:
    """A call that ended; times are seconds of the router's clock.

    Attributes:
        request_id: as in logs and ``x-request-id``.
        stage: of its workflow.
        came_s: when it came.
        placed_s: when it was first placed, ``None`` if it never was.
        sent_s: when it was placed for the last time.
        first_token_s: when the first token of a stream came.
        ended_s: when it ended.
        outcome: how.
        engine: where it was last.
        reason: word of the policy for that.
        tries: times it was sent.
        slack_s: predicted when it was placed, infinite without deadline, ``None`` if unknown.
        prompt_tokens: of the prompt, as the engine says.
        cached_tokens: of these, found in the prefix cache.
        output_tokens: of the answer.
        tenant: who paid.
        expected_prompt_tokens: length of the prompt as the router took it to be.
        expected_cached_tokens: of these, taken to be in the prefix cache; ``None`` if it was never
            placed.
        migrations: times that another engine was to go on with it.
    """

    request_id: str
    stage: str
    came_s: float
    placed_s: float | None
    sent_s: float | None
    first_token_s: float | None
    ended_s: float
    outcome: str
    engine: str
    reason: str
    tries: int
    slack_s: float | None
    prompt_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None
    tenant: str
    expected_prompt_tokens: int
    expected_cached_tokens: int | None
    migrations: int

    def __init__(  # noqa: PLR0913 - one for each attribute
        self,
        *,
        request_id: str,
        stage: str,
        came_s: float,
        placed_s: float | None,
        sent_s: float | None,
        first_token_s: float | None,
        ended_s: float,
        outcome: str,
        engine: str,
        reason: str,
        tries: int,
        slack_s: float | None,
        prompt_tokens: int | None,
        cached_tokens: int | None,
        output_tokens: int | None,
        tenant: str,
        expected_prompt_tokens: int,
        expected_cached_tokens: int | None,
        migrations: int = 0,
    ) -> None:
        self.request_id, self.stage, self.tenant = request_id, stage, tenant
        self.came_s, self.placed_s, self.sent_s = came_s, placed_s, sent_s
        self.first_token_s, self.ended_s, self.slack_s = first_token_s, ended_s, slack_s
        self.outcome, self.engine, self.reason = outcome, engine, reason
        self.tries, self.migrations = tries, migrations
        self.prompt_tokens, self.cached_tokens = prompt_tokens, cached_tokens
        self.output_tokens = output_tokens
        self.expected_prompt_tokens = expected_prompt_tokens
        self.expected_cached_tokens = expected_cached_tokens

    @classmethod
    def of(cls, job: Job, now: float) -> CallAccount:
        """Return the account of a call that ends now."""
        placement, result = job.placement, job.result
        call = None if job.accepted is None else job.accepted.call
        expected = 0 if call is None else call.prompt_tokens
        cached = None if placement is None else max(expected - placement.uncached_tokens, 0)
        slack_s = None
        if placement is not None and placement.finish_s is not None:
            slack_s = placement.deadline_s - placement.tail_s - placement.finish_s
        return CallAccount(
            request_id=job.request_id or "",
            stage="" if call is None else call.stage,
            came_s=job.began_s,
            placed_s=job.placed_s,
            sent_s=job.sent_s,
            first_token_s=job.first_token_s,
            ended_s=now,
            outcome=job.outcome._value_,  # as ``value``, which is a call
            engine="" if placement is None else placement.engine_id,
            reason="" if placement is None else placement.reason,
            tries=job.tries,
            migrations=job.migrations,
            slack_s=slack_s,
            prompt_tokens=result.prompt_tokens,
            cached_tokens=result.cached_tokens,
            output_tokens=result.output_tokens,
            tenant="" if call is None else call.tenant,
            expected_prompt_tokens=expected,
            expected_cached_tokens=cached,
        )

    def recorded(self, began_s: float) -> RecentCall | None:
        """Return what the tuner plays of it, ``None`` if it was not answered.

        Few engines say what their prefix cache had: then it is what the router took it to have.
        """
        if self.outcome != Outcome.ANSWERED or not self.output_tokens:
            return None
        prompt = max(self.prompt_tokens or self.expected_prompt_tokens, 1)
        said = self.cached_tokens
        cached = self.expected_cached_tokens if said is None else said
        return RecentCall(
            stage=self.stage,
            at_s=round(self.came_s - began_s, 4),
            took_s=round(self.ended_s - self.came_s, 4),
            prompt=prompt,
            output=self.output_tokens,
            cached=None if cached is None else min(cached, prompt),
        )

    def parts(self) -> dict[str, float]:
        """Return the seconds that each of :data:`PARTS` took; they add up to all of it."""
        if self.placed_s is None or self.sent_s is None:
            return {"queue": self.ended_s - self.came_s}
        found = {"queue": self.placed_s - self.came_s, "retries": self.sent_s - self.placed_s}
        if self.first_token_s is None or self.first_token_s < self.sent_s:
            return {**found, "engine": self.ended_s - self.sent_s}
        prefill_s, decode_s = self.first_token_s - self.sent_s, self.ended_s - self.first_token_s
        return {**found, "prefill": prefill_s, "decode": decode_s}


@dataclass(init=False, slots=True)
class WorkflowAccount:
    """A workflow, ended or open.

    Attributes:
        workflow_id: as the router knows it.
        workflow_type: as the client says.
        outcome: of it; :data:`OPEN` as long as it has none.
        began_s: when its first call came.
        ended_s: when its last call ended, so far.
        deadline_s: of it, infinite for none.
        demoted: whether it was.
        calls: that ended, by their ends; so many as are kept.
    """

    workflow_id: str
    workflow_type: str
    outcome: str
    began_s: float
    ended_s: float
    deadline_s: float
    demoted: bool
    calls: Sequence[CallAccount]

    def __init__(
        self,
        workflow_id: str,
        workflow_type: str,
        *,
        outcome: str,
        began_s: float,
        ended_s: float,
        deadline_s: float,
        demoted: bool,
        calls: Sequence[CallAccount] = (),
    ) -> None:
        self.workflow_id, self.workflow_type, self.outcome = workflow_id, workflow_type, outcome
        self.began_s, self.ended_s, self.deadline_s = began_s, ended_s, deadline_s
        self.demoted, self.calls = demoted, calls

    @classmethod
    def of(cls, run: WorkflowRun, calls: Sequence[CallAccount], *, ended: bool) -> WorkflowAccount:
        """Return the account of a workflow."""
        return WorkflowAccount(
            workflow_id=run.workflow_id,
            workflow_type=run.workflow_type,
            outcome=outcome(run) if ended else OPEN,
            # A busy router notices the first call later than it came.
            began_s=min((run.started_s, *(call.came_s for call in calls))),
            ended_s=run.last_seen_s,
            deadline_s=run.deadline_s,
            demoted=run.background,
            calls=sorted(calls, key=lambda call: call.ended_s),
        )

    @property
    def took_s(self) -> float:
        """Seconds from its first call to its last end."""
        return self.ended_s - self.began_s

    @property
    def slack_s(self) -> float:
        """Seconds left at its end, negative when it was late, infinite without deadline."""
        return self.deadline_s - self.ended_s

    def path(self) -> list[CallAccount]:
        """Return the calls that decided how long it took, first to last."""
        found: list[CallAccount] = []
        for call in reversed(self.calls):
            if not found or call.ended_s <= found[-1].came_s:
                found.append(call)
        return found[::-1]

    def parts(self) -> dict[str, float]:
        """Return the seconds that each of :data:`PARTS` took along :meth:`path`."""
        found = dict.fromkeys(PARTS, 0.0)
        at_s = self.began_s
        for call in self.path():
            found["client"] += max(call.came_s - at_s, 0.0)
            for name, seconds in call.parts().items():
                found[name] += seconds
            at_s = call.ended_s
        return found

    def recorded(self) -> RecentWorkflow | None:
        """Return what the tuner plays of it, ``None`` if not all of its calls are kept.

        One that an answer is missing in did not finish.
        """
        if not 0 < len(self.calls) < _MAX_CALLS:
            return None
        found = [call.recorded(self.began_s) for call in self.calls]
        calls = tuple(call for call in found if call is not None)
        whole = len(calls) == len(found)
        limit_s = _said(self.deadline_s - self.began_s)
        # Its client may have ended it while calls were under way.
        last_s = max(self.ended_s, self.calls[-1].ended_s)
        return RecentWorkflow(
            type=self.workflow_type,
            arrived_s=self.began_s,
            calls=calls,
            tenant=self.calls[0].tenant,
            deadline_s=None if limit_s is None else max(limit_s, 0.0),
            latency_s=round(last_s - self.began_s, 4) if whole else None,
        )

    def view(self) -> dict[str, Any]:
        """Return it as JSON can say it; times of calls count from its beginning."""
        path = {id(call) for call in self.path()}  # clients may give one request id to several
        return {
            "workflow": self.workflow_id,
            "type": self.workflow_type,
            "outcome": self.outcome,
            "deadline_s": _said(self.deadline_s - self.began_s),
            "took_s": round(self.took_s, 3),
            "slack_s": _said(self.slack_s),
            "demoted": self.demoted,
            "parts": {name: round(seconds, 3) for name, seconds in self.parts().items()},
            "calls": [self._call(call, id(call) in path) for call in self.calls],
        }

    def _call(self, call: CallAccount, decided: bool) -> Mapping[str, Any]:
        times = {
            name: None if at_s is None else round(max(at_s - self.began_s, 0.0), 3)
            for name in ("came_s", "placed_s", "sent_s", "first_token_s", "ended_s")
            for at_s in (getattr(call, name),)
        }
        return {
            "request_id": call.request_id,
            "stage": call.stage,
            **times,
            "outcome": call.outcome,
            "engine": call.engine,
            "reason": call.reason,
            "why": REASONS.get(call.reason, call.reason),
            "tries": call.tries,
            "migrations": call.migrations,
            "slack_s": _said(call.slack_s),
            "prompt_tokens": call.prompt_tokens,
            "cached_tokens": call.cached_tokens,
            "output_tokens": call.output_tokens,
            "on_path": decided,
        }


NO_TIMES: Final[Mapping[str, float | None]] = {
    "took_median_s": None,
    "took_tail_s": None,
    "ttft_median_s": None,
    "ttft_tail_s": None,
}
"""Quantiles of a type of which nothing is known."""


def _said(seconds: float | None) -> float | None:
    if seconds is None or not math.isfinite(seconds) or abs(seconds) >= NO_DEADLINE:
        return None
    return round(seconds, 3)


class _Open:
    """A workflow of which a call is under way, or that has not ended.

    Attributes:
        calls: that ended.
        under_way: ids of those that have not.
        run: the workflow, once it has ended.
    """

    def __init__(self) -> None:
        self.calls: list[CallAccount] = []
        self.under_way: set[str] = set()
        self.run: WorkflowRun | None = None


class Accounts:
    """Keeps the calls of open workflows, and some workflows that ended.

    Args:
        most: ended workflows that are remembered.

    Attributes:
        ring: gets those that ended, for the tuner; ``None`` where there is none.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._open: dict[str, _Open] = {}
        self._ended: OrderedDict[str, WorkflowAccount] = OrderedDict()
        self._most = most
        self._requests: OrderedDict[str, str] = OrderedDict()
        self.ring: Ring | None = None

    def call_began(self, call: Call, request_id: str) -> None:
        """Note a call that is to be placed."""
        self._requests[call.call_id] = request_id
        if len(self._requests) > self._most:
            self._requests.popitem(last=False)
        of = self._open.get(call.workflow_id)
        if of is not None and of.run is not None:  # it begins anew
            self._close(of, of.run)
            of = None
        if of is None:
            of = self._open[call.workflow_id] = _Open()
        of.under_way.add(call.call_id)

    def request_of(self, call_id: str) -> str | None:
        """Return the request that a call is, ``None`` for one of long ago."""
        return self._requests.get(call_id)

    def call_ended(self, call: Call, job: Job, now: float, *, known: bool) -> None:
        """Note a call that ends now; its workflow may have ended with it a moment ago.

        Args:
            call: that began.
            job: it.
            now: the time.
            known: whether its workflow is open.
        """
        of = self._open.get(call.workflow_id)
        if of is None or call.call_id not in of.under_way:
            return
        of.under_way.discard(call.call_id)
        if len(of.calls) < _MAX_CALLS:
            of.calls.append(CallAccount.of(job, now))
        if of.under_way:
            return
        if of.run is not None:
            self._close(of, of.run)
        elif not known:  # it never came to be one
            del self._open[call.workflow_id]

    def workflow_ended(self, run: WorkflowRun) -> None:
        """Note that a workflow ended: its account is closed, and logged, with its last call."""
        of = self._open.get(run.workflow_id) or _Open()
        of.run = run
        if not of.under_way:
            self._close(of, run)

    def workflow_moved(self, run: WorkflowRun) -> None:
        """Note that a workflow goes on at another router, where its account will be closed."""
        self._open.pop(run.workflow_id, None)

    def _close(self, of: _Open, run: WorkflowRun) -> None:
        self._open.pop(run.workflow_id, None)
        account = WorkflowAccount.of(run, of.calls, ended=True)
        _log(account)
        recent = None if self.ring is None else account.recorded()
        if self.ring is not None and recent is not None:
            self.ring.add(recent)
        if not account.workflow_id.startswith(LONE):
            self._ended.pop(account.workflow_id, None)
            self._ended[account.workflow_id] = account
            if len(self._ended) > self._most:
                self._ended.popitem(last=False)

    def of(self, workflow_id: str, run: WorkflowRun | None) -> WorkflowAccount | None:
        """Return the account of a workflow; ``run`` is what is known of it if it is open."""
        if run is not None:
            of = self._open.get(workflow_id) or _Open()
            return WorkflowAccount.of(run, of.calls, ended=False)
        return self._ended.get(workflow_id)

    def times(self, since_s: float) -> dict[str, Mapping[str, float | None]]:
        """Return by type how long workflows took, and their streams to the first token.

        Args:
            since_s: ends before that do not count.
        """
        took: dict[str, list[float]] = {}
        first: dict[str, list[float]] = {}
        for one in self._ended.values():
            if one.ended_s >= since_s:
                took.setdefault(one.workflow_type, []).append(one.took_s)
                first.setdefault(one.workflow_type, []).extend(
                    call.first_token_s - call.came_s
                    for call in one.calls
                    if call.first_token_s is not None
                )
        return {
            name: dict(
                zip(
                    NO_TIMES,
                    (_quantile(of, q) for of in (took[name], first[name]) for q in (0.5, 0.95)),
                    strict=True,
                )
            )
            for name in took
        }

    def recent(self, most: int) -> list[WorkflowAccount]:
        """Return workflows that ended lately, the last first."""
        return [self._ended[name] for name in list(reversed(self._ended))[:most]]


def _quantile(found: list[float], q: float) -> float | None:
    if not found:
        return None
    return round(sorted(found)[min(int(q * len(found)), len(found) - 1)], 3)


def _log(account: WorkflowAccount) -> None:
    """Log a workflow in a line, and one that was not on time with a line for each call."""
    named = not account.workflow_id.startswith(LONE)
    level = logging.INFO if named else logging.DEBUG
    if not _LOG.isEnabledFor(level):
        return
    name, parts = account.workflow_id.replace(" ", "-"), account.parts()
    _LOG.log(
        level,
        "workflow ended workflow=%s type=%s outcome=%s calls=%d took_s=%.3f deadline_s=%s "
        "slack_s=%s demoted=%s queue_s=%.3f retries_s=%.3f prefill_s=%.3f decode_s=%.3f "
        "engine_s=%.3f client_s=%.3f",
        name,
        account.workflow_type.replace(" ", "-"),
        account.outcome,
        len(account.calls),
        account.took_s,
        _said(account.deadline_s - account.began_s),
        _said(account.slack_s),
        account.demoted,
        *(parts[part] for part in PARTS),
    )
    if account.outcome == ON_TIME:
        return
    for call in account.view()["calls"]:
        _LOG.log(
            level,
            "call of workflow=%s request_id=%s stage=%s outcome=%s engine=%s reason=%s tries=%d "
            "migrations=%d came_s=%.3f placed_s=%s sent_s=%s first_token_s=%s ended_s=%.3f "
            "slack_s=%s prompt_tokens=%s cached_tokens=%s output_tokens=%s on_path=%s",
            name,
            call["request_id"],
            call["stage"].replace(" ", "-"),
            Outcome(call["outcome"]).value,
            call["engine"],
            call["reason"],
            *(call[k] for k in ("tries", "migrations", "came_s", "placed_s", "sent_s")),
            call["first_token_s"],
            *(call[k] for k in ("ended_s", "slack_s", "prompt_tokens", "cached_tokens")),
            call["output_tokens"],
            call["on_path"],
        )
