"""Sends probes to an engine over its OpenAI endpoint and times the answers.

The probes are a small design in which every coefficient moves alone. Prompts of several lengths
with one output token, one at a time, give the cost of prefill. Batches of equal calls of several
sizes, with short and with long prompts, give the cost of decoding. No two prompts share a prefix,
so that a prefix cache does not help.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any, Final

import aiohttp

from hexgen_vllm.bench.text import DEFAULT_VOCAB_SIZE, PromptSource
from hexgen_vllm.calibrate.fit import DecodeTiming, PrefillTiming
from hexgen_vllm.clock import Clock
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.sim.workloads.workload import CallSpec
from hexgen_vllm.wire import from_json

_ROUND_TRIPS: Final = 9
OUTPUT_TOKENS: Final = 24
SHORT_PROMPT: Final = 16
MAX_PROMPT: Final = 8192
MAX_BATCH: Final = 32
_REPEATS: Final = 3


@dataclass(frozen=True, slots=True)
class ProbeBatch:
    """Equal calls that are sent at once.

    Attributes:
        batch: how many.
        prompt_tokens: length of each prompt.
        output_tokens: tokens that each call must write.
    """

    batch: int
    prompt_tokens: int
    output_tokens: int


def design(context_tokens: int, max_num_seqs: int) -> list[ProbeBatch]:
    """Return the probes for an engine, most informative first.

    Args:
        context_tokens: longest call that the model takes.
        max_num_seqs: sequences of a full batch; no probe queues.
    """
    longest = max(min(context_tokens - OUTPUT_TOKENS - 1, MAX_PROMPT), SHORT_PROMPT)
    lengths = sorted({max(longest * share // 8, SHORT_PROMPT) for share in (0, 1, 2, 4, 7)})
    sizes = [n for n in (1, 2, 4, 8, 16, MAX_BATCH) if n <= max_num_seqs]
    if max_num_seqs < MAX_BATCH and max_num_seqs not in sizes:
        sizes.append(max_num_seqs)
    long = max(longest // 4, SHORT_PROMPT)
    prefill = [ProbeBatch(1, n, 1) for n in lengths]
    decode = [ProbeBatch(b, n, OUTPUT_TOKENS) for n in sorted({SHORT_PROMPT, long}) for b in sizes]
    return [*prefill, *decode, *(_REPEATS - 1) * prefill]


@dataclass(slots=True)
class Timings:
    """What the probes measured so far."""

    prefills: list[PrefillTiming] = field(default_factory=list)
    decodes: list[DecodeTiming] = field(default_factory=list)
    calls: int = 0


@dataclass(slots=True)
class Measurement:
    """Probes one engine.

    Attributes:
        session: what to send with.
        url: base URL of the engine, without ``/v1``.
        model: served model name.
        clock: what times are taken with.
        salt: sets the prompts of this measurement apart from all others.
        timings: what was measured.
        round_trip_s: seconds of a request that computes nothing.
    """

    session: aiohttp.ClientSession
    url: str
    model: str
    clock: Clock
    salt: str
    timings: Timings = field(default_factory=Timings)
    round_trip_s: float = 0.0

    async def run(
        self, probes: list[ProbeBatch], budget_s: float, progress: Callable[[int, int], None]
    ) -> Timings:
        """Send ``probes`` one after the other until the budget is spent.

        Args:
            probes: most informative first.
            budget_s: no probe starts later than this, seconds.
            progress: called with the number of probes done and their count.

        Raises:
            ConfigError: the engine refuses a probe or stops answering.
        """
        start_s = self.clock.now()
        await self._probe(ProbeBatch(1, 32, 8))  # the first call of a server may compile or warm up
        self.timings = Timings()
        self.round_trip_s = await self._round_trip()
        for done, probe in enumerate(probes):
            if self.clock.now() - start_s > budget_s:
                break
            await self._probe(probe)
            progress(done + 1, len(probes))
        return self.timings

    async def _round_trip(self) -> float:
        """Return the median seconds of a request that computes nothing."""
        found = []
        for _ in range(_ROUND_TRIPS):
            sent_s = self.clock.now()
            async with self.session.get(f"{self.url}/v1/models") as response:
                await response.read()
            found.append(self.clock.now() - sent_s)
        return median(found)

    async def _probe(self, probe: ProbeBatch) -> None:
        sent_s = self.clock.now()
        calls = (self._call(probe) for _ in range(probe.batch))
        try:
            times = await asyncio.gather(*calls)
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
            reason = str(error) or type(error).__name__
            raise ConfigError(f"{self.url} did not answer a probe: {reason}.") from None
        if probe.output_tokens == 1:
            seconds = times[0][0][0] - sent_s - self.round_trip_s
            if seconds > 0:
                self.timings.prefills.append(PrefillTiming(probe.prompt_tokens, seconds))
        else:
            self._learn_decode(probe, times)

    def _learn_decode(self, probe: ProbeBatch, times: list[list[tuple[float, int]]]) -> None:
        """Learn from the time in which all calls of a batch were decoding."""
        begin_s = max(stamps[0][0] for stamps in times)
        end_s = min(stamps[-1][0] for stamps in times)
        steps, seen, total_s = 0, 0, 0.0
        for stamps in times:
            for (before_s, before), (after_s, after) in pairwise(stamps):
                if before_s >= begin_s and after_s <= end_s:
                    steps += after - before
                    total_s += after_s - before_s
                    seen += before * (after - before)
        if steps and total_s > 0:
            context = probe.prompt_tokens + seen / steps
            self.timings.decodes.append(DecodeTiming(probe.batch, context, total_s / steps))

    async def _call(self, probe: ProbeBatch) -> list[tuple[float, int]]:
        """Send one call; return when the stream grew, and to how many output tokens."""
        body = self._body(probe)
        stamps: list[tuple[float, int]] = []
        tokens = 0
        async with self.session.post(f"{self.url}/v1/completions", json=body) as response:
            if response.status != 200:
                raise ValueError(f"HTTP {response.status}")
            async for line in response.content:
                new = _new_tokens(line)
                if new:
                    tokens += new
                    stamps.append((self.clock.now(), tokens))
        if not stamps:
            raise ValueError("the answer held no token")
        return stamps

    def _body(self, probe: ProbeBatch) -> dict[str, object]:
        self.timings.calls += 1
        prompts = PromptSource(DEFAULT_VOCAB_SIZE, salt=f"{self.salt}/{self.timings.calls}")
        call = CallSpec("calibrate", probe.prompt_tokens, probe.output_tokens)
        return {
            "model": self.model,
            "prompt": prompts.token_ids("calibrate", self.timings.calls, call),
            "max_tokens": probe.output_tokens,
            "min_tokens": probe.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "return_token_ids": True,  # a busy server may put several tokens into one event
        }


def _new_tokens(line: bytes) -> int:
    """Return how many tokens one line of a stream carries."""
    if not line.startswith(b"data: {"):
        return 0
    event: dict[str, Any] = from_json(line[5:])
    if "error" in event:
        raise ValueError(f"the answer is an error: {event['error']}")
    choices = event.get("choices")
    if not choices:
        return 0
    ids = choices[0].get("token_ids")
    return len(ids) if isinstance(ids, list) else 1
