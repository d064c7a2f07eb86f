"""Speculation while calls are left out of steps, with a worker that drafts for the next step only.

So do workers whose steps overlap: the scheduler knows of their drafts only how many there are, and
what was drafted for a step that a call misses is gone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

from benchmarks.engine.headless import Setup
from hexgen_vllm.engine.scheduler import UrgencyScheduler
from tests.engine.nomodel.harness import FakeEngine, FakeWorker, expected
from tests.engine.nomodel.test_mix import chat, warm

DRAFTS = 2
NOT_THERE = -1  # what the scheduler says of a draft that only the worker knows


class NextStepDrafter(FakeWorker):
    """Verifies drafts; KV of those that it rejects is left behind, and wrong."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.drafts: dict[str, list[int]] = {}  # of the last step
        self.scheduled: dict[str, list[int]] = {}
        self.accepted = self.rejected = 0

    def execute(self, output: Any) -> ModelRunnerOutput:
        self.scheduled = output.scheduled_spec_decode_tokens
        result = super().execute(output)
        sampled = zip(result.req_ids, result.sampled_token_ids, strict=True)
        self.drafts = {name: self._drafted(name) for name, tokens in sampled if tokens}
        return result

    def _drafted(self, request_id: str) -> list[int]:
        """Two tokens, of which the second is wrong for every other sequence."""
        tokens = self.sequences[request_id].tokens
        first, second = expected(tokens, DRAFTS)
        return [first, second + len(tokens) % 2]

    def _run(self, request_id: str, count: int) -> list[int]:
        sequence, drafts = self.sequences[request_id], list(self.scheduled.get(request_id, ()))
        count -= len(drafts)
        if NOT_THERE in drafts:
            if request_id not in self.drafts:
                self.errors.append(f"{request_id}: its drafts are gone")
            drafts = self.drafts.get(request_id, [])[: len(drafts)]
            # The scheduler takes all drafts of steps under way for accepted.
            sequence.computed = len(sequence.tokens) - 1
        out = super()._run(request_id, count)
        for draft in drafts:
            if draft != out[-1]:
                break
            sequence.computed = len(sequence.tokens) - 1
            out += super()._run(request_id, 1)
        self.accepted += max(len(out) - 1, 0)
        self.rejected += len(drafts) - max(len(out) - 1, 0)
        for position in range(len(sequence.tokens) - 1, len(sequence.tokens) - 1 + DRAFTS):
            if drafts and position // self.block_size < len(sequence.blocks):
                self.kv[self.slot(sequence, position)] = NOT_THERE
        return out


class NextStepEngine(FakeEngine):
    """Hands drafts to the scheduler where steps do not overlap, as vLLM's engine core does."""

    def __init__(self, folder: Path, setup: Setup) -> None:
        super().__init__(UrgencyScheduler, folder, setup)
        self.scheduler.num_spec_tokens = self.scheduler.num_lookahead_tokens = DRAFTS
        self.worker: NextStepDrafter = NextStepDrafter(setup.blocks, setup.block_size)

    def take_output(self) -> None:
        super().take_output()
        if not self.setup.async_scheduling:
            drafts = self.worker.drafts
            self.scheduler.update_draft_token_ids(
                DraftTokenIds(list(drafts), list(drafts.values()))
            )


@pytest.mark.parametrize("overlapping", [False, True])
def test_no_draft_outlives_a_step_that_its_call_missed(folder: Path, overlapping: bool) -> None:
    setup = Setup(blocks=200, max_num_seqs=12, async_scheduling=overlapping)
    engine = NextStepEngine(folder, setup)
    warm(engine)
    for i in range(8):
        engine.add(f"batch{i}", [5 + i] * 60, 120)
    engine.steps(10)
    left_out = set[str]()
    for turn in range(4):
        engine.add(f"chat{turn}", [99 + turn] * 40, 60, chat(0.5, 60))
        while f"chat{turn}" not in engine.ended:
            engine.step()
            left_out |= engine.scheduler._pauser._out
    assert len(left_out) >= 4, "hardly anybody was left out of a step"
    engine.run()
    assert all(engine.tokens[f"batch{i}"] == expected([5 + i] * 60, 120) for i in range(8))
    assert all(engine.tokens[f"chat{i}"] == expected([99 + i] * 40, 60) for i in range(4))
    assert min(engine.worker.accepted, engine.worker.rejected) > 100
    engine.assert_clean()
