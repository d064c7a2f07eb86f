"""A workflow that has begun, and what is remembered of its calls to learn from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from hexgen_vllm.policy.calls import CALL_WEIGHT, PREFILL_WEIGHT
from hexgen_vllm.types import NO_DEADLINE

MAX_CALLS: Final = 256  # calls of one workflow that teach


@dataclass(init=False, slots=True)
class SeenCall:
    """One call of a running or finished workflow."""

    stage: str
    ordinal: int
    arrived_s: float
    prompt_tokens: int
    ended_s: float | None
    uncached_tokens: int
    output_tokens: int

    def __init__(self, stage: str, ordinal: int, arrived_s: float, prompt_tokens: int) -> None:
        self.stage, self.ordinal = stage, ordinal
        self.arrived_s, self.prompt_tokens, self.ended_s = arrived_s, prompt_tokens, None
        self.uncached_tokens = self.output_tokens = 0

    def copied(self) -> SeenCall:
        """Return the same, which does not change with this one."""
        copy = SeenCall(self.stage, self.ordinal, self.arrived_s, self.prompt_tokens)
        copy.ended_s, copy.uncached_tokens = self.ended_s, self.uncached_tokens
        copy.output_tokens = self.output_tokens
        return copy

    def weight(self) -> float:
        """Return the call's work in output tokens."""
        return CALL_WEIGHT + self.output_tokens + PREFILL_WEIGHT * self.uncached_tokens


@dataclass(slots=True)
class WorkflowRun:
    """A workflow that has begun (mutable, owned by the open workflows)."""

    workflow_id: str
    workflow_type: str
    started_s: float
    deadline_s: float = NO_DEADLINE
    ordered_by_s: float = NO_DEADLINE  # the deadline that orders its calls
    last_seen_s: float = 0.0
    in_flight: int = 0
    background: bool = False
    begun: bool = False  # one of its calls was placed
    final: bool = False  # a call that ended was said to be the last
    failed: bool = False  # the call that ended last was not answered
    admitted: bool = False  # one of its calls was taken in
    asked: bool = False  # its client asked for the deadline, of itself and not of a part
    attained: float = 0.0  # work of its calls that ended, in output tokens
    calls: dict[str, SeenCall] = field(default_factory=dict)
    stage_counts: dict[str, int] = field(default_factory=dict)
    learned_as: str = ""  # where that is not its type alone
    asked_s: float = -math.inf  # when its client last said a deadline
    lone: bool = False  # nothing follows its first call
    engine: str = ""  # where its call was placed last, and how the prompt of that began
    prefix: tuple[int, ...] = ()
    chunk_tokens: int = 0
    elsewhere_s: float = -math.inf  # when another coordinator last saw it
    turn: int = 0  # grows with every call; where a call follows another, whatever clocks say
    left: bool = False  # a later call of it came elsewhere
    over: bool = False  # another coordinator has ended it
