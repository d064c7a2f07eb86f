"""Values that travel between the wire, the policies and their drivers.

Times are seconds on the driver's clock (absolute unless named ``_in_s``), sizes are tokens.

No policy changes a value. Those made for every call are not frozen, though: that makes
them three times as slow to make. And they write their ``__init__`` out: one that ``dataclass``
makes stays interpreted in compiled code (mypyc), at ten times the price. Compiled, those cannot be
pickled or copied; ``dataclasses.replace`` is the way.
"""

from __future__ import annotations

import enum
import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

NO_DEADLINE = math.inf
OF: Final = " of "
"""Between the name of a thing and the tenant to whom it belongs; neither has blanks."""
LONE: Final = "lone "
"""How the id of a workflow begins that is one call without a workflow; no client can send it."""
SLACK_BOUNDS_S: Final = (-60.0, -10.0, -5.0, -1.0, 0.0, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the buckets in which calls are counted by slack; one more has the rest."""


def slack_counts(slacks_s: Iterable[float]) -> list[int]:
    """Return how many calls have a slack in each bucket of :data:`SLACK_BOUNDS_S`, then above."""
    counts = [0] * (len(SLACK_BOUNDS_S) + 1)
    for slack_s in slacks_s:
        counts[bisect_left(SLACK_BOUNDS_S, slack_s)] += 1
    return counts


@dataclass(init=False, slots=True, unsafe_hash=True)
class Call:
    """One LLM call of a workflow, as every policy sees it.

    Attributes:
        call_id: unique in the process that made it.
        workflow_id: the workflow it belongs to; a call without one is its own workflow.
        workflow_type: name under which the shape of such workflows is learned.
        stage: name of the stage, such as ``revise``.
        tenant: who pays; used for fair shares.
        taught_by: the tenant from whose calls alone is learned what to expect of it; ``""`` for
            everybody's.
        model: served model name; an engine must serve it.
        arrived_s: when it was received.
        deadline_s: end-to-end deadline of the whole workflow, ``inf`` when none.
        deadline_asked: a client asked for that deadline; it is no default.
        prompt_tokens: prompt length; an estimate in the router, exact in an engine.
        expected_output_tokens: hint of the client, ``None`` when it gave none.
        max_output_tokens: hard limit of the request, ``None`` when it set none.
        stages_left: hint of the client: stages that follow this one.
        final: the client says that nothing follows this call.
        priority: importance, higher is sooner; 0 is normal.
        streamed: its first token will be seen; otherwise only its end is.
        prefix: chain hashes of the prompt's leading chunks, for prefix affinity.
        prefix_chunk_tokens: tokens that one entry of ``prefix`` stands for.
        engine: name of the only engine that can take it, as it has what the call follows.
        root: the workflow at the top of the tree of agents that it is part of, ``None`` if it is
            in none. It is ``workflow_id`` where those above wait for it.
        resume_s: hint of the client: seconds from its end to the next call of the workflow; 0 if
            none is expected.
        whole: one engine must compute both its prompt and its answer.
    """

    call_id: str
    workflow_id: str
    arrived_s: float
    prompt_tokens: int
    workflow_type: str
    stage: str
    tenant: str
    model: str
    deadline_s: float
    expected_output_tokens: int | None
    max_output_tokens: int | None
    stages_left: int | None
    final: bool
    priority: int
    streamed: bool
    prefix: tuple[int, ...]
    prefix_chunk_tokens: int
    deadline_asked: bool
    engine: str | None
    taught_by: str
    root: str | None
    resume_s: float | None
    whole: bool

    def __init__(  # noqa: PLR0913 - one for each attribute
        self,
        call_id: str,
        workflow_id: str,
        arrived_s: float,
        prompt_tokens: int,
        workflow_type: str = "default",
        stage: str = "default",
        *,
        tenant: str = "default",
        model: str = "",
        deadline_s: float = NO_DEADLINE,
        expected_output_tokens: int | None = None,
        max_output_tokens: int | None = None,
        stages_left: int | None = None,
        final: bool = False,
        priority: int = 0,
        streamed: bool = True,
        prefix: tuple[int, ...] = (),
        prefix_chunk_tokens: int = 0,
        deadline_asked: bool = True,
        engine: str | None = None,
        taught_by: str = "",
        root: str | None = None,
        resume_s: float | None = None,
        whole: bool = False,
    ) -> None:
        self.whole = whole
        self.engine, self.taught_by = engine, taught_by
        self.root, self.resume_s = root, resume_s
        self.call_id, self.workflow_id, self.arrived_s = call_id, workflow_id, arrived_s
        self.prompt_tokens, self.workflow_type, self.stage = prompt_tokens, workflow_type, stage
        self.tenant, self.model, self.deadline_s = tenant, model, deadline_s
        self.expected_output_tokens, self.stages_left = expected_output_tokens, stages_left
        self.max_output_tokens, self.deadline_asked = max_output_tokens, deadline_asked
        self.final, self.priority, self.streamed = final, priority, streamed
        self.prefix, self.prefix_chunk_tokens = prefix, prefix_chunk_tokens

    @property
    def learned_as(self) -> str:
        """Name under which its shape is learned; types have no blanks."""
        owner = self.taught_by
        return f"{self.workflow_type}{OF}{owner}" if owner else self.workflow_type


class EngineKind(enum.Enum):
    """What a router can ask of an engine."""

    HEXGEN = "hexgen"  # our scheduler: takes deadline, tail and stage
    PRIORITY = "priority"  # stock vLLM, --scheduling-policy priority: takes one number
    FCFS = "fcfs"  # stock vLLM: takes nothing


class Role(enum.Enum):
    """What part of a call an engine is there for."""

    BOTH = "both"
    PREFILL = "prefill"  # computes prompts, for others to answer
    DECODE = "decode"  # goes on from KV that others computed


class EngineState(enum.Enum):
    """Whether an engine gets new calls."""

    READY = "ready"
    TRIAL = "trial"  # failed lately: gets one call at a time
    DRAINING = "draining"  # finishes what it has, gets nothing new
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What is known of an engine when it joins.

    Attributes:
        engine_id: stable name; ties between engines break by it.
        models: served model names; empty means any.
        kind: what it can order by.
        max_num_seqs: sequences it runs at once, ``None`` when unknown.
        kv_tokens: tokens its KV cache holds, ``None`` when unknown.
        max_num_batched_tokens: tokens of a step, ``None`` when unknown.
        max_model_len: tokens of the longest prompt with its output, ``None`` when unknown.
        speed: relative speed for rules that weigh by it, ``None`` to go by what is measured.
        role: what part of a call it is there for.
    """

    engine_id: str
    models: frozenset[str] = frozenset()
    kind: EngineKind = EngineKind.FCFS
    max_num_seqs: int | None = None
    kv_tokens: int | None = None
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    speed: float | None = None
    role: Role = Role.BOTH


@dataclass(frozen=True, slots=True)
class StepCost:
    """Time of one engine step, in seconds.

    t = c0 + c1*n_decode + c2*ctx_decode + p0*[prefill > 0] + p1*n_prefill + p2*prefill_ctx,
    where ``ctx_decode`` is the sum of context tokens over decoding sequences and ``prefill_ctx``
    the sum over prefill chunks of tokens times context.
    """

    c0: float
    c1: float
    c2: float
    p0: float
    p1: float
    p2: float

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        """Let it be pickled, frozen and compiled as it may be."""
        return StepCost, (self.c0, self.c1, self.c2, self.p0, self.p1, self.p2)

    def step_s(
        self,
        n_decode: float,
        ctx_decode: float = 0.0,
        n_prefill: float = 0.0,
        prefill_ctx: float = 0.0,
    ) -> float:
        """Return the predicted seconds of one step."""
        t = self.c0 + self.c1 * n_decode + self.c2 * ctx_decode
        if n_prefill > 0:
            t += self.p0 + self.p1 * n_prefill + self.p2 * prefill_ctx
        return t

    def prefill_s(self, tokens: float, context: float = 0.0, chunk: int = 2048) -> float:
        """Return the seconds that prefilling ``tokens`` after ``context`` cached ones adds."""
        if tokens <= 0:
            return 0.0
        steps = math.ceil(tokens / chunk)
        return steps * self.p0 + self.p1 * tokens + self.p2 * tokens * (context + tokens / 2)

    def scaled(self, factor: float) -> StepCost:
        """Return the cost of a device ``factor`` times slower."""
        own = (self.c0, self.c1, self.c2, self.p0, self.p1, self.p2)
        return StepCost(*(factor * v for v in own))


@dataclass(frozen=True, slots=True)
class EngineReport:
    """Telemetry of one engine at one moment; ``None`` means unknown, never zero.

    Attributes:
        cost: fitted step cost.
        fit_error: median relative error of the fit on recent steps (0.1 is 10 %).
        running: sequences in the batch.
        waiting: calls queued in the engine.
        kv_usage: share of KV blocks in use, 0 to 1.
        preemptions: preemptions since start.
        prefill_share: share of busy time spent on prefill, 0 to 1.
    """

    cost: StepCost | None = None
    fit_error: float | None = None
    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None
    preemptions: int | None = None
    prefill_share: float | None = None


@dataclass(init=False, slots=True, unsafe_hash=True)
class Placement:
    """Send a call to an engine now.

    Attributes:
        call_id: the call.
        engine_id: where it goes.
        reason: short word for metrics and diagnostics, such as ``finish``.
        score: the value that won; its meaning depends on the policy.
        finish_s: predicted completion, ``None`` when the policy does not predict.
        due_s: when the call must end for the workflow to be on time, ``inf`` without deadline.
        deadline_s: deadline of the workflow.
        tail_s: predicted seconds of critical path after this call.
        expected_output_tokens: output length the decision stands on.
        uncached_tokens: prompt tokens expected to need prefill there.
        background: the workflow is demoted.
        priority_key: what stock engines with priorities are told, the smallest first; ``None`` for
            ``due_s``.
        decode_s: predicted seconds from its first token to its last.
        prefill: where its prompt is computed first, if another engine is to do that.
    """

    call_id: str
    engine_id: str
    reason: str
    score: float
    finish_s: float | None
    due_s: float
    deadline_s: float
    tail_s: float
    expected_output_tokens: int
    uncached_tokens: int
    background: bool
    priority_key: float | None
    decode_s: float
    prefill: Placement | None

    def __init__(  # noqa: PLR0913 - one for each attribute
        self,
        call_id: str,
        engine_id: str,
        reason: str,
        *,
        score: float = 0.0,
        finish_s: float | None = None,
        due_s: float = NO_DEADLINE,
        deadline_s: float = NO_DEADLINE,
        tail_s: float = 0.0,
        expected_output_tokens: int = 0,
        uncached_tokens: int = 0,
        background: bool = False,
        priority_key: float | None = None,
        decode_s: float = 0.0,
        prefill: Placement | None = None,
    ) -> None:
        self.prefill = prefill
        self.call_id, self.engine_id, self.reason = call_id, engine_id, reason
        self.priority_key, self.decode_s = priority_key, decode_s
        self.score, self.finish_s, self.due_s = score, finish_s, due_s
        self.deadline_s, self.tail_s, self.background = deadline_s, tail_s, background
        self.expected_output_tokens, self.uncached_tokens = expected_output_tokens, uncached_tokens

    @property
    def ordered_by_s(self) -> float:
        """Deadline that an engine is to order by, so that deadline minus tail is ``due_s``."""
        due_s = self.due_s
        plain = self.background or due_s == NO_DEADLINE
        if plain or due_s == self.deadline_s - self.tail_s:
            return self.deadline_s
        return due_s + self.tail_s


@dataclass(frozen=True, slots=True)
class Rejection:
    """Do not serve a call; ``reason`` is a word of the overload vocabulary."""

    call_id: str
    reason: str
    message: str
    status: int = 503
    retry_after_s: float = 1.0


Decision = Placement | Rejection


@dataclass(init=False, slots=True, unsafe_hash=True)
class CallResult:
    """How a call ended.

    Attributes:
        ok: it was answered in full.
        prompt_tokens: true prompt length if the engine said it.
        cached_tokens: prompt tokens served from the prefix cache, if said.
        output_tokens: true output length if known.
        reason: ``stop``, ``length``, ``abort``, or a failure word.
    """

    ok: bool
    prompt_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None
    reason: str

    def __init__(
        self,
        ok: bool,
        prompt_tokens: int | None = None,
        cached_tokens: int | None = None,
        output_tokens: int | None = None,
        reason: str = "stop",
    ) -> None:
        self.ok, self.prompt_tokens, self.cached_tokens = ok, prompt_tokens, cached_tokens
        self.output_tokens, self.reason = output_tokens, reason
