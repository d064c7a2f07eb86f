"""Values that the policies hand each other about one call.

Made for every call, so they write their ``__init__`` out (see :mod:`hexgen_vllm.types`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from hexgen_vllm.types import Call, Placement

# Weight of one prompt token against one output token when paths are compared. Published device
# rates give 1/90 to 1/170 (prefill 1.2-11.5 k tokens/s against 11.5-40 ms a decode step).
PREFILL_WEIGHT: Final = 0.01
# Fixed weight of a call, in output tokens: queueing and hops.
CALL_WEIGHT: Final = 2.0


@dataclass(init=False, slots=True, unsafe_hash=True)
class Tail:
    """The critical path after a call: later calls, their tokens, and time that is the client's.

    ``think_s`` is the seconds from the end of what came before such a call to its arrival: tools,
    a user, the client's own work.
    """

    calls: float
    prefill_tokens: float
    output_tokens: float
    think_s: float

    def __init__(
        self, calls: float, prefill_tokens: float, output_tokens: float, think_s: float = 0.0
    ) -> None:
        self.calls, self.prefill_tokens = calls, prefill_tokens
        self.output_tokens, self.think_s = output_tokens, think_s


NOTHING: Final = Tail(0.0, 0.0, 0.0)


def path_weight(tail: Tail) -> float:
    """Return the work of a path in output tokens, for comparing paths."""
    return tail.output_tokens + PREFILL_WEIGHT * tail.prefill_tokens + CALL_WEIGHT * tail.calls


@dataclass(init=False, slots=True)
class Handover:
    """The prompt of a call, were a prefill engine to compute it now.

    Attributes:
        engine_id: the prefill engine.
        ready_s: seconds from now until the KV is there.
        uncached_tokens: prompt tokens that it has to compute.
        token_delay_s: price of each of them: the seconds it adds to the other calls there, as the
            policy weighs those.
        externality: that weight.
        token_s: seconds in which the KV of a token reaches an engine that has not shown it.
    """

    engine_id: str
    ready_s: float
    uncached_tokens: int
    token_delay_s: float
    externality: float
    token_s: float

    def __init__(
        self,
        engine_id: str,
        ready_s: float,
        uncached_tokens: int,
        token_delay_s: float,
        externality: float,
        token_s: float,
    ) -> None:
        self.engine_id, self.ready_s, self.uncached_tokens = engine_id, ready_s, uncached_tokens
        self.token_delay_s, self.externality, self.token_s = token_delay_s, externality, token_s

    @property
    def price_s(self) -> float:
        """The seconds until it is there, and those that it adds to others."""
        return self.ready_s + self.token_delay_s * self.uncached_tokens


@dataclass(init=False, slots=True)
class Forecast:
    """What placing a call on an engine now would mean, all in seconds from now.

    Attributes:
        wait_s: until a sequence slot is free.
        prefill_s: from then until its first token.
        decode_s: from then until its last token.
        delay_others_s: sum over the other calls there of the time it adds to them.
        uncached_tokens: prompt tokens that need prefill.
        finish_in_s: from now until its last token.
        arrives_s: until the KV of its prompt is there from a prefill engine, ``None`` where it is
            computed here. Then ``prefill_s`` is what that takes beyond ``wait_s``.
    """

    wait_s: float
    prefill_s: float
    decode_s: float
    delay_others_s: float
    uncached_tokens: int
    finish_in_s: float
    arrives_s: float | None

    def __init__(
        self,
        wait_s: float,
        prefill_s: float,
        decode_s: float,
        delay_others_s: float,
        uncached_tokens: int,
        arrives_s: float | None = None,
    ) -> None:
        self.arrives_s = arrives_s
        self.wait_s, self.prefill_s, self.decode_s = wait_s, prefill_s, decode_s
        self.delay_others_s, self.uncached_tokens = delay_others_s, uncached_tokens
        self.finish_in_s = wait_s + prefill_s + decode_s


@dataclass(init=False, slots=True, unsafe_hash=True)
class Demand:
    """A call with what was estimated about it.

    Attributes:
        call: the call.
        output_tokens: expected output length.
        deadline_s: D, deadline of its workflow.
        tail_s: R, predicted critical path after it.
        due_s: D - R, when it must end; ``inf`` without deadline. Where D is no credible claim,
            or the call came after D - R, it is later (:mod:`hexgen_vllm.policy.claims`).
        started_s: when its workflow began.
        handover: the best prefill engine for its prompt now, ``None`` where there is none.
    """

    call: Call
    output_tokens: int
    deadline_s: float
    tail_s: float
    due_s: float
    started_s: float
    handover: Handover | None

    def __init__(
        self,
        call: Call,
        output_tokens: int,
        deadline_s: float,
        tail_s: float,
        due_s: float,
        started_s: float,
        handover: Handover | None = None,
    ) -> None:
        self.call, self.output_tokens, self.deadline_s = call, output_tokens, deadline_s
        self.tail_s, self.due_s, self.started_s = tail_s, due_s, started_s
        self.handover = handover

    @property
    def tokens(self) -> int:
        """Prompt and expected output."""
        return self.call.prompt_tokens + self.output_tokens


@dataclass(init=False, slots=True)
class InFlight:
    """A placed call and what is known of its progress (mutable, owned by the coordinator)."""

    call: Call
    placement: Placement
    placed_s: float
    first_token_s: float | None
    output_tokens: int
    batch: int  # calls on the engine when it was placed, itself included
    starts_s: float | None  # when its first token is predicted, if it will not be seen
    longer: int | None  # output tokens expected since it outran the placement's estimate
    moved_tokens: int  # prompt tokens whose KV comes from a prefill engine
    moved_s: float | None  # when that engine had them computed

    def __init__(self, call: Call, placement: Placement, placed_s: float, batch: int = 1) -> None:
        self.call, self.placement = call, placement
        self.placed_s, self.batch = placed_s, batch
        self.first_token_s = self.starts_s = self.longer = None
        self.output_tokens = self.moved_tokens = 0
        self.moved_s = None

    @property
    def started(self) -> bool:
        """Whether the first token has come, so that its prefill is done."""
        return self.first_token_s is not None

    @property
    def expected_tokens(self) -> int:
        """Output tokens expected in all, as of now."""
        return self.placement.expected_output_tokens if self.longer is None else self.longer

    def output_left(self) -> int:
        """Return output tokens still expected, at least 1."""
        return max(self.expected_tokens - self.output_tokens, 1)
