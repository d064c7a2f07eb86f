"""A real vLLM engine with a backlog of batch calls and bursts of chat calls, for ``bench mix``.

Real kernels, real KV cache, real scheduler. Time is that of a device which is slower than this
machine: a step takes 25 ms and 1.5 ms more for each call that decodes in it, or the time that this
process got to compute it, whichever is more. So what the scheduler costs counts, and what else
runs on the machine does not.

The engine runs in this process, so that ``$VLLM_ENABLE_V1_MULTIPROCESSING`` must be 0.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from vllm import SamplingParams
from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine

from hexgen_vllm import wire
from hexgen_vllm.engine.compat import LikeStock
from hexgen_vllm.engine.scheduler import UrgencyScheduler
from hexgen_vllm.engine.telemetry import step_shape
from hexgen_vllm.testing.pace import DeviceSpeed

SLOTS: Final = 48
DEADLINE_S: Final = 3.5
_PACE: Final = DeviceSpeed(prefill_tokens_per_s=4000.0, step_ms=25.0, per_sequence_ms=1.5)
_ON_S, _CYCLE_S, _WARM_S = 6.0, 24.0, 8.0
_CHATS_PER_S: Final = 2.0
_BACKLOG: Final = 200
_VOCABULARY: Final = (5, 1000)


@dataclass(frozen=True)
class LiveLoad:
    """The calls of one run.

    Attributes:
        seed: of everything random.
        bursts: chat calls come for 6 s, then for 18 s none: a quarter of the time, as in A.
        chats, batch: which kinds are sent.
    """

    seed: int
    bursts: int = 3
    chats: bool = True
    batch: bool = True

    @property
    def seconds(self) -> float:
        """How long it lasts, with the seconds before the first burst."""
        return _WARM_S + self.bursts * _CYCLE_S

    def calls(self) -> list[LiveCall]:
        """Return the calls in order of arrival."""
        rng = random.Random(f"{self.seed}/batch")
        found = []
        for i in range(_BACKLOG if self.batch else 0):
            prompt = _tokens(rng, rng.randint(40, 150))
            found.append(LiveCall(f"batch{i}", prompt, rng.randint(300, 900), 0.0))
        rng = random.Random(f"{self.seed}/chat")
        for i, at_s in enumerate(self._arrivals(rng)):
            prompt = _tokens(rng, rng.randint(50, 200))
            found.append(LiveCall(f"chat{i}", prompt, rng.randint(15, 60), at_s, chat=True))
        return found

    def least_share(self) -> float:
        """Return the share of the device's time that chat calls need at the very least."""
        chats = [call for call in self.calls() if call.chat]
        decode_s = sum(call.output_tokens for call in chats) * _PACE.per_sequence_ms / 1000
        prefill_s = sum(len(call.prompt) for call in chats) / _PACE.prefill_tokens_per_s
        return (decode_s + prefill_s) / (self.seconds - _WARM_S)

    def _arrivals(self, rng: random.Random) -> Iterator[float]:
        busy_s = 0.0
        while self.chats:
            busy_s += rng.expovariate(_CHATS_PER_S)
            burst, rest_s = divmod(busy_s, _ON_S)
            if burst >= self.bursts:
                return
            yield _WARM_S + burst * _CYCLE_S + rest_s


@dataclass
class LiveCall:
    """A call; times are seconds since the run began.

    Attributes:
        name: its id.
        prompt: token ids.
        output_tokens: what it writes.
        at_s: when it comes.
        chat: it has a deadline.
        written: tokens so far.
        ended_s: when it ended.
    """

    name: str
    prompt: list[int]
    output_tokens: int
    at_s: float
    chat: bool = False
    written: int = 0
    ended_s: float = math.inf

    @property
    def on_time(self) -> bool:
        """Whether it ended within its deadline."""
        return self.ended_s - self.at_s <= DEADLINE_S


@dataclass
class LiveOutcome:
    """What an engine made of a load.

    Attributes:
        chats: the chat calls, as they ended.
        batch: tokens per second of batch calls, from the first burst on.
    """

    chats: list[LiveCall] = field(default_factory=list)
    batch: float = 0.0

    @property
    def interactive(self) -> float:
        """Chat calls on time, in per cent."""
        return 100 * sum(call.on_time for call in self.chats) / max(len(self.chats), 1)


class DeviceClock:
    """Seconds of the device; they pass with its steps."""

    def __init__(self) -> None:
        self.now = 0.0
        self._computed_s = time.process_time()

    def __call__(self) -> float:
        """Return the present moment."""
        return self.now

    def spend(self, output: Any) -> None:
        """Let the step of ``output`` pass."""
        shape, computed_s = step_shape(output), time.process_time()
        own_s = computed_s - self._computed_s
        self.now += max(_PACE.step_s(shape.n_decode, shape.n_prefill), own_s)
        self._computed_s = computed_s

    def wait(self, until_s: float) -> None:
        """Let time pass in which nothing is to be done."""
        self.now = max(self.now, until_s)
        self._computed_s = time.process_time()


class OnDevice(LikeStock):
    """A scheduler whose steps take the device's time; put it before the scheduler class."""

    device_clock: DeviceClock

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Let the step's time pass, then take in its output."""
        if scheduler_output.total_num_scheduled_tokens:
            self.device_clock.spend(scheduler_output)
        return super().update_from_output(scheduler_output, model_runner_output)


class StockOnDevice(OnDevice):
    """Stock vLLM."""


class UrgencyOnDevice(OnDevice, UrgencyScheduler):
    """Ours."""


class LiveEngine:
    """One engine in this process.

    Args:
        model: path of its model.
        policy: ``fcfs`` or ``priority`` of stock vLLM, or ``ours``.
        slots: calls in a full batch.
    """

    def __init__(self, model: str, policy: str, slots: int = SLOTS) -> None:
        self._policy = policy
        args = EngineArgs(
            model=model,
            dtype="float32",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=2048,
            max_num_seqs=slots,
            num_gpu_blocks_override=SLOTS * 1200 // 32,
            block_size=32,
            disable_log_stats=True,
            scheduling_policy="priority" if policy == "priority" else "fcfs",
        )
        args.scheduler_cls = UrgencyOnDevice if policy == "ours" else StockOnDevice
        self._llm = LLMEngine.from_engine_args(args)
        self._clock = DeviceClock()
        scheduler = self._llm.engine_core.engine_core.scheduler
        scheduler.device_clock = scheduler.hexgen_clock = self._clock

    def close(self) -> None:
        """Stop the engine."""
        self._llm.engine_core.shutdown()
        destroy_model_parallel()
        destroy_distributed_environment()

    def play(self, load: LiveLoad) -> LiveOutcome:
        """Play ``load`` to its end; what is under way then is dropped."""
        todo = load.calls()
        todo.reverse()
        calls = {call.name: call for call in todo}
        clock, began_s, before, from_s = self._clock, self._clock.now, 0, 0.0
        while (now := clock.now - began_s) < load.seconds:
            while todo and todo[-1].at_s <= now:
                self._add(todo[-1], began_s + todo[-1].at_s)
                todo.pop()
            if not self._llm.has_unfinished_requests():
                clock.wait(began_s + (todo[-1].at_s if todo else load.seconds))
                continue
            outputs = self._llm.step()
            now = clock.now - began_s
            for output in outputs:
                call = calls[output.request_id]
                call.written = len(output.outputs[0].token_ids)
                if output.finished:
                    call.ended_s = now
            if not from_s and now >= _WARM_S:
                before, from_s = _written(calls), now
        outcome = LiveOutcome([call for call in calls.values() if call.chat])
        outcome.batch = (_written(calls) - before) / (now - from_s)
        return outcome

    def _add(self, call: LiveCall, came_s: float) -> None:
        meta = wire.CallMeta(workflow_type="batch")
        if call.chat:
            meta = wire.CallMeta(
                workflow_id=call.name,
                workflow_type="chat",
                workflow_deadline_ms=1000 * DEADLINE_S,
                workflow_final=True,
            )
        params = SamplingParams(
            temperature=0.0,
            max_tokens=call.output_tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args=wire.to_xargs(meta),
        )
        priority = int(self._policy == "priority" and not call.chat)
        prompt: Any = {"type": "token", "prompt_token_ids": call.prompt}
        # It has waited for the end of the step that was under way when it came.
        arrived_s = time.time() - (self._clock.now - came_s)
        self._llm.add_request(call.name, prompt, params, priority=priority, arrival_time=arrived_s)


@contextmanager
def engine(model: str, policy: str, slots: int = SLOTS) -> Iterator[LiveEngine]:
    """Start an engine, and stop it again."""
    made = LiveEngine(model, policy, slots)
    try:
        yield made
    finally:
        made.close()


def _written(calls: dict[str, LiveCall]) -> int:
    return sum(call.written for call in calls.values() if not call.chat)


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(*_VOCABULARY) for _ in range(count)]
