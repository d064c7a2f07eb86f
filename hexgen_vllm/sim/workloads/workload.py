"""What a workload is made of: workflows, their groups of parallel calls, shared prompt layers.

Values only. Generators and readers make them, the simulator and the live bench play them.
Lengths are tokens, times are seconds since the start of the run.
They arrive as a Poisson process, more or less bursty, or at given times.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

from hexgen_vllm.errors import ConfigError


def poisson(count: int, rate_per_s: float, rng: random.Random) -> tuple[float, ...]:
    """Return ``count`` arrivals of a Poisson process.

    Raises:
        ConfigError: the rate is not a finite number above 0.
    """
    _check_rate(rate_per_s)
    return _running_sum(rng.expovariate(rate_per_s) for _ in range(count))


def gamma_bursts(
    count: int, rate_per_s: float, variation: float, rng: random.Random
) -> tuple[float, ...]:
    """Return ``count`` arrivals whose gaps follow a gamma distribution.

    Args:
        count: how many.
        rate_per_s: mean arrivals per second.
        variation: standard deviation of a gap over its mean; 1 is Poisson, more comes in bursts.
        rng: where randomness comes from.

    Raises:
        ConfigError: rate or variation is not a finite number above 0.
    """
    _check_rate(rate_per_s)
    if not (math.isfinite(variation) and variation > 0):
        raise ConfigError(f"the variation of arrivals must be more than 0, not {variation:g}.")
    shape = 1.0 / variation**2
    return _running_sum(rng.gammavariate(shape, 1.0 / (rate_per_s * shape)) for _ in range(count))


def recorded(times_s: Sequence[float], *, speed: float = 1.0) -> tuple[float, ...]:
    """Return recorded arrivals from 0 on, played ``speed`` times as fast.

    Raises:
        ConfigError: a time is not finite or earlier than the one before, or the speed is not
            more than 0.
    """
    if not (math.isfinite(speed) and speed > 0):
        raise ConfigError(f"the speed of recorded arrivals must be more than 0, not {speed:g}.")
    for index, at in enumerate(times_s):
        if not math.isfinite(at) or (index and at < times_s[index - 1]):
            raise ConfigError(f"recorded arrival {index + 1} must not be before the one before it.")
    return tuple((at - times_s[0]) / speed for at in times_s)


def _check_rate(rate_per_s: float) -> None:
    if not (math.isfinite(rate_per_s) and rate_per_s > 0):
        raise ConfigError(f"the arrival rate must be more than 0 per second, not {rate_per_s:g}.")


def _running_sum(gaps: Iterable[float]) -> tuple[float, ...]:
    return tuple(accumulate(gaps))


class Layer(NamedTuple):
    """A leading part of a prompt: the first ``tokens`` tokens of the stream ``stream``.

    Two layers of one stream share their common length token for token, wherever they occur.
    """

    stream: str
    tokens: int


@dataclass(frozen=True, slots=True)
class CallSpec:
    """One LLM call.

    Attributes:
        stage: name of the stage.
        prompt_tokens: prompt length, at least 1.
        output_tokens: output length, at least 1.
        layers: leading layers of the prompt, widest shared first: the stage's template, the
            database schema, what the workflow's calls share. The rest of the prompt is this
            call's own and equals no other call's.
        think_s: seconds between the end of what it waits for and its sending: a tool, a person.
        after: calls that it waits for, by their place in :meth:`WorkflowSpec.calls`, all before
            its own; ``None`` is every call of the group before.
    """

    stage: str
    prompt_tokens: int
    output_tokens: int
    layers: tuple[Layer, ...] = ()
    think_s: float = 0.0
    after: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise ConfigError(f"a {self.stage} call needs at least 1 prompt and 1 output token.")
        if self.shared_tokens > self.prompt_tokens:
            raise ConfigError(f"the layers of a {self.stage} call are longer than its prompt.")
        if not 0 <= self.think_s < math.inf:
            raise ConfigError(f"the think time of a {self.stage} call must be 0 or more seconds.")

    @property
    def shared_tokens(self) -> int:
        """Prompt tokens that lie in layers."""
        return sum(layer.tokens for layer in self.layers)

    @property
    def own_tokens(self) -> int:
        """Prompt tokens after the layers."""
        return self.prompt_tokens - self.shared_tokens


CallGroup = tuple[CallSpec, ...]


@dataclass(frozen=True, slots=True)
class WorkflowSpec:
    """One workflow: groups in sequence, the calls of a group in parallel.

    Calls that name what they wait for (:attr:`CallSpec.after`) make it a graph instead: each starts
    when those have ended, whatever else of their groups is under way.

    Attributes:
        workflow_id: unique in the workload.
        type: name under which the shape of such workflows is learned.
        stages: groups; a group starts when every call of the one before has ended.
        arrival_s: when it starts, seconds since the start of the run.
        tenant: who sends it.
    """

    workflow_id: str
    type: str
    stages: tuple[CallGroup, ...]
    arrival_s: float = 0.0
    tenant: str = "default"

    def __post_init__(self) -> None:
        if not self.stages or not all(self.stages):
            raise ConfigError(f"workflow {self.workflow_id} has no call, or a group without one.")
        for index, call in enumerate(self.calls()):
            if call.after is not None and not all(0 <= at < index for at in call.after):
                raise ConfigError(
                    f"call {index} of workflow {self.workflow_id} waits for one that comes later."
                )

    def waits(self) -> list[tuple[int, ...]]:
        """Return for each call the calls that it waits for, in order of groups."""
        found: list[tuple[int, ...]] = []
        before: tuple[int, ...] = ()
        for group in self.stages:
            found.extend(before if call.after is None else call.after for call in group)
            before = tuple(range(len(found) - len(group), len(found)))
        return found

    @property
    def ends_with_one(self) -> bool:
        """Whether one call ends after all others, so that it can be told to be the last."""
        if len(self.stages[-1]) > 1 or not self.is_graph:
            return len(self.stages[-1]) == 1
        waits = self.waits()
        reached: set[int] = set()
        left = [len(waits) - 1]
        while left:
            index = left.pop()
            if index not in reached:
                reached.add(index)
                left.extend(waits[index])
        return len(reached) == len(waits)

    @property
    def is_graph(self) -> bool:
        """Whether a call names what it waits for."""
        return any(call.after is not None for call in self.calls())

    def calls(self) -> Iterator[CallSpec]:
        """Yield every call, in order of groups."""
        for group in self.stages:
            yield from group

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of all calls."""
        return sum(call.prompt_tokens for call in self.calls())

    @property
    def output_tokens(self) -> int:
        """Output tokens of all calls."""
        return sum(call.output_tokens for call in self.calls())


def workflow_stream(workflow_id: str, part: int | None = None) -> str:
    """Return a stream that only the calls of one workflow share; ``part`` tells several apart."""
    return f"workflow:{workflow_id}" if part is None else f"workflow:{workflow_id}/{part}"


def recorded_stream(part: int) -> str:
    """Return a stream that several workflows of a trace share, and the first of them computes."""
    return f"trace:{part}"


def is_recorded(stream: str) -> bool:
    """Return whether a stream is one of :func:`recorded_stream`."""
    return stream.startswith("trace:")


def is_own(stream: str, workflow_id: str) -> bool:
    """Return whether only the calls of one workflow share ``stream``."""
    own = workflow_stream(workflow_id)
    return stream == own or stream.startswith(f"{own}/")


def generator(seed: int, *names: object) -> random.Random:
    """Return a random stream of its own for ``names``; equal arguments give equal streams.

    Each workflow has its own, so that the k-th workflow does not depend on how many are made.
    """
    return random.Random("/".join(str(part) for part in (seed, *names)))


def timed(specs: Iterable[WorkflowSpec], arrivals_s: Sequence[float]) -> tuple[WorkflowSpec, ...]:
    """Return ``specs`` with the given arrival times, one each.

    Raises:
        ConfigError: the numbers of workflows and times differ.
    """
    listed = tuple(specs)
    if len(listed) != len(arrivals_s):
        raise ConfigError(f"{len(listed)} workflows cannot arrive at {len(arrivals_s)} times.")
    return tuple(replace(s, arrival_s=float(at)) for s, at in zip(listed, arrivals_s, strict=True))


def renamed(spec: WorkflowSpec, workflow_id: str) -> WorkflowSpec:
    """Return ``spec`` as another workflow: what it shared with nobody else is new as well."""
    old, new = workflow_stream(spec.workflow_id), workflow_stream(workflow_id)

    def moved(call: CallSpec) -> CallSpec:
        layers = (
            layer._replace(stream=new + layer.stream[len(old) :])
            if is_own(layer.stream, spec.workflow_id)
            else layer
            for layer in call.layers
        )
        return replace(call, layers=tuple(layers))

    stages = tuple(tuple(moved(call) for call in group) for group in spec.stages)
    return replace(spec, workflow_id=workflow_id, stages=stages)


def unshared(spec: WorkflowSpec) -> WorkflowSpec:
    """Return ``spec`` with prompts of equal lengths that have nothing in common."""
    stages = tuple(tuple(replace(call, layers=()) for call in group) for group in spec.stages)
    return replace(spec, stages=stages)


def scaled(spec: WorkflowSpec, length_scale: float) -> WorkflowSpec:
    """Return ``spec`` with every length times ``length_scale``, at least 1.

    Boundaries of layers are rounded from the front, so prompts that shared a layer still do.

    Raises:
        ConfigError: ``length_scale`` is not more than 0.
    """
    if not length_scale > 0:
        raise ConfigError(f"length_scale must be more than 0, not {length_scale:g}.")
    stages = tuple(tuple(_scaled_call(c, length_scale) for c in group) for group in spec.stages)
    return replace(spec, stages=stages)


def _scaled_call(call: CallSpec, scale: float) -> CallSpec:
    prompt = max(1, round(call.prompt_tokens * scale))
    most = prompt - 1 if call.own_tokens and prompt > 1 else prompt  # own prompts stay own
    layers, end, scaled_end = [], 0, 0
    for layer in call.layers:
        end += layer.tokens
        boundary = min(round(end * scale), most)
        layers.append(Layer(layer.stream, boundary - scaled_end))
        scaled_end = boundary
    return CallSpec(
        stage=call.stage,
        prompt_tokens=prompt,
        output_tokens=max(1, round(call.output_tokens * scale)),
        layers=tuple(layer for layer in layers if layer.tokens > 0),
        think_s=call.think_s,
        after=call.after,
    )
