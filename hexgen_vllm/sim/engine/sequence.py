"""One call inside a simulated engine, and what the engine is: its step cost and vLLM's limits."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Final

from hexgen_vllm.option import check, option
from hexgen_vllm.sim.engine.prefix_cache import Holding, Link
from hexgen_vllm.types import NO_DEADLINE, Placement, Role, StepCost

NO_LIMIT: Final = 1 << 30


@dataclass(frozen=True)
class EngineModel:
    """What a simulated engine is."""

    engine_id: str
    cost: StepCost
    device: str = option("", "name of the device")
    role: str = option(
        Role.BOTH.value,
        "what part of a call it is there for; loads and deadlines are those of engines for both",
        choices=tuple(role.value for role in Role),
    )
    max_num_seqs: int = option(256, "sequences in a batch", least=1)
    max_num_batched_tokens: int = option(2048, "tokens in a step", least=1)
    kv_tokens: int = option(400_000, "tokens that the KV cache holds", least=1)
    block_size: int = option(16, "tokens of a KV block", least=1)
    watermark: float = option(
        0.0, "share of KV blocks kept free when calls are admitted", least=0.0, most=0.99
    )
    prefix_caching: bool = option(True, "whether prefixes are cached")
    kv_copy_tokens_per_s: float | None = option(
        None, "rate of copying preempted KV to the host and back; none is recompute", least=1.0
    )
    host_kv_tokens: int = option(
        0, "tokens of KV of ended calls that host memory holds; needs kv_copy_tokens_per_s", least=0
    )
    async_scheduling: bool = option(
        False, "whether a step is scheduled while the one before it is computed"
    )

    def __post_init__(self) -> None:
        check(self)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        """Let it be pickled, frozen and compiled as it may be."""
        return EngineModel, tuple(getattr(self, one.name) for one in fields(self))

    @property
    def blocks(self) -> int:
        """KV blocks."""
        return self.kv_tokens // self.block_size


class Sequence:
    """State of a call in an engine (mutable, owned by the engine until it is finished).

    Moments are seconds of virtual time.

    Attributes:
        call_id: name, for decisions and traces.
        tag: the driver's own reference; engines do not look at it.
        prompt_tokens: prompt length.
        total_tokens: prompt and output length together; where it ends.
        deadline_s, tail_s, expected_tokens, background: what the router said of it.
        most_tokens: output tokens that the request allows.
        likely_most: output tokens, at a high quantile.
        tail_tokens: output tokens of R; the seconds of its prefills are ``tail_prefill_s``.
        least_tail_s: R at a low quantile.
        routed: a router placed it, and judges what is late.
        workflow_id: its workflow, if the engine is told.
        final: the engine is told that it is the last call of its workflow.
        late: it cannot be on time any more, and comes after those that can.
        promoted: it waited so long that it goes first among calls of its rank.
        paused: it is in the batch but left out of steps.
        priority: the client's, as vLLM has it: lower is sooner.
        arrived_s: when it reached the engine.
        began_s: when the first call of its workflow arrived, where the engine judges what is late.
        rank: its priority, or behind all if it is demoted.
        key_s: its place among calls of its rank; smaller is sooner.
        latest_start_s: L, credited with progress.
        queued_start_s: L when it last joined the queue.
        tokens: prompt and output tokens so far; while it decodes, see ``base``.
        computed: tokens whose KV is there; while it decodes, one less than its tokens.
        base: while it decodes, its tokens are ``base`` plus the steps of the decode clock.
        decoding: it is on the decode clock.
        chunk: prompt tokens it computes in this step.
        number: order of admission.
        holding: its KV blocks.
        displacements: how often it lost its place for urgency.
        loaded_tokens: prompt tokens whose KV has come from another engine when it is admitted.
        saved_tokens: tokens whose KV was copied to the host when it was preempted.
        cached_tokens: prompt tokens that the prefix cache served at its first admission.
        first_token_s: when its first token came, ``None`` before.
    """

    __slots__ = (
        "arrived_s",
        "background",
        "base",
        "began_s",
        "cached_tokens",
        "call_id",
        "chunk",
        "computed",
        "deadline_s",
        "decoding",
        "displacements",
        "expected_tokens",
        "final",
        "first_token_s",
        "holding",
        "key_s",
        "late",
        "latest_start_s",
        "least_tail_s",
        "likely_most",
        "loaded_tokens",
        "most_tokens",
        "number",
        "paused",
        "priority",
        "priority_key",
        "promoted",
        "prompt_tokens",
        "queued_start_s",
        "rank",
        "routed",
        "saved_tokens",
        "tag",
        "tail_prefill_s",
        "tail_s",
        "tail_tokens",
        "tokens",
        "total_tokens",
        "workflow_id",
    )

    def __init__(
        self,
        placement: Placement,
        prompt_tokens: int,
        output_tokens: int,
        *,
        chain: tuple[Link, ...] = (),
        tag: Any = None,
        loaded_tokens: int = 0,
    ) -> None:
        self.loaded_tokens = loaded_tokens
        self.call_id, self.tag = placement.call_id, tag
        self.prompt_tokens = self.tokens = prompt_tokens
        self.total_tokens = prompt_tokens + output_tokens
        self.deadline_s, self.tail_s = placement.ordered_by_s, placement.tail_s
        key = placement.priority_key
        self.priority_key = NO_DEADLINE if key is None else key
        self.expected_tokens = placement.expected_output_tokens
        self.background = placement.background
        self.most_tokens = NO_LIMIT
        self.rank = self.priority = 0
        self.arrived_s = self.began_s = self.key_s = self.latest_start_s = self.queued_start_s = 0.0
        self.computed = self.base = self.chunk = self.number = 0
        self.displacements = self.saved_tokens = 0
        self.decoding = self.late = self.paused = self.promoted = False
        self.likely_most = self.expected_tokens
        self.tail_prefill_s, self.tail_tokens, self.least_tail_s = self.tail_s, 0, 0.0
        self.routed, self.final = True, False
        self.workflow_id: str | None = None
        self.cached_tokens = -1
        self.first_token_s: float | None = None
        self.holding = Holding(chain, [])

    @property
    def has_deadline(self) -> bool:
        """Whether it can be late: it has a deadline, and its workflow is not demoted."""
        return self.deadline_s < NO_DEADLINE and not (self.background or self.late)
