"""The workflows of ``bench preempt``, and what becomes of them.

The load is closed: so many workflows are in flight, and one that ends makes room for the next, so
that fast and slow devices are pressed alike. The calls of a workflow follow one another, each with
the prompt and the output of those before it. Every third workflow is urgent; deadlines are
multiples of the time that a workflow takes alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Final

URGENT_EVERY: Final = 3
_PATIENT: Final = 10.0
_THINK: Final = (-4.405, 4.078)  # mean and deviation of the logarithm
_LONGEST_THINK_S: Final = 120.0
_VOCABULARY: Final = (2, 1000)


def tokens(rng: random.Random, count: int) -> list[int]:
    """Return ``count`` random token ids."""
    return [rng.randrange(*_VOCABULARY) for _ in range(count)]


@dataclass(frozen=True)
class Case:
    """What is run; lengths in tokens.

    Attributes:
        model: path or name.
        dtype: of weights and KV.
        in_flight: workflows at once.
        workflows: workflows in all.
        stages: calls of a workflow.
        prompt: new prompt tokens of a call, least and most.
        output: output tokens of a call, least and most.
        contexts: contexts for which resuming is timed.
        repeats: times each is timed.
        host_kv_gib: host memory for KV, GiB.
        seed: of prompts and lengths.
        urgent: deadline of urgent workflows, as a multiple of a lone one; others have ten times
            as much.
        block_size: tokens per KV block.
        think: whether a workflow waits for a tool between its calls.
    """

    model: str
    dtype: str
    in_flight: int
    workflows: int
    stages: int
    prompt: tuple[int, int]
    output: tuple[int, int]
    contexts: tuple[int, ...]
    repeats: int
    host_kv_gib: float
    seed: int
    urgent: float
    block_size: int = 32
    think: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.stages * (self.prompt[1] + self.output[1])

    @property
    def tight_blocks(self) -> int:
        """KV blocks for a fifth of the load, yet for one call of any kind."""
        fifth = self.in_flight * self.longest // (5 * self.block_size)
        longest = max((self.longest, *self.contexts)) + self.block_size
        return max(fifth, -(-longest // self.block_size)) + 1

    @property
    def ample_blocks(self) -> int:
        """KV blocks for everything at once."""
        return (self.in_flight + 1) * (self.longest // self.block_size + 2)

    def prompt_tokens(self) -> int:
        """Return the tokens of all prompts together."""
        found = 0
        for number in range(self.workflows):
            context = 0
            for prompt, writes in make_workflow(self, number, 1.0, 0.0).calls:
                found += (context := context + len(prompt))
                context += writes
        return found


@dataclass
class Workflow:
    """One workflow: the calls it still makes, and what it has said and read so far.

    Before each call but the first it thinks for the next of ``thinks``, seconds.
    """

    name: str
    deadline_s: float
    urgent: bool
    stage_s: float
    calls: list[tuple[list[int], int]]
    context: list[int] = field(default_factory=list)
    thinks: list[float] = field(default_factory=list)


@dataclass
class LoadResult:
    """What a run of the load showed; times in seconds."""

    written: dict[str, list[int]] = field(default_factory=dict)
    steps_s: list[float] = field(default_factory=list)
    on_time: int = 0
    urgent_on_time: int = 0
    took_s: float = 0.0
    started_s: list[float] = field(default_factory=list)

    def ended(self, workflow: Workflow, now: float) -> None:
        """Count a workflow that ended at ``now``."""
        on_time = now <= workflow.deadline_s
        self.on_time += on_time
        self.urgent_on_time += on_time and workflow.urgent


def make_workflow(case: Case, number: int, lone_s: float, now: float) -> Workflow:
    """Return workflow ``number`` of ``case``, which starts ``now``; always the same one.

    Args:
        case: the load.
        number: which workflow.
        lone_s: seconds that a workflow takes alone.
        now: the present, seconds.
    """
    rng = random.Random(f"{case.seed}/{number}")
    urgent = number % URGENT_EVERY == 0
    calls = [
        (tokens(rng, rng.randint(*case.prompt)), rng.randint(*case.output))
        for _ in range(case.stages)
    ]
    thinks = [think_s(rng) for _ in calls[1:]] if case.think else [0.0] * (case.stages - 1)
    deadline_s = now + sum(thinks) + lone_s * case.urgent * (1.0 if urgent else _PATIENT)
    each_s = lone_s / case.stages
    return Workflow(f"w{number}", deadline_s, urgent, each_s, calls, thinks=thinks)


def think_s(rng: random.Random) -> float:
    """Return how long a tool takes, seconds: log-normal, 86 % below 1 s, 95 % below 10 s."""
    return min(rng.lognormvariate(*_THINK), _LONGEST_THINK_S)
