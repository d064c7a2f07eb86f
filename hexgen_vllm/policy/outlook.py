"""What an engine learns of its own calls: how long they get, and what comes after them.

The same learned shapes as in the router (:mod:`hexgen_vllm.policy.shapes`), per workflow type
and stage, and apart for calls without deadline: a night's batch answers say nothing of the next
chat answer. Nothing learned counts more than what is said: a client's expected length, a router's
tail, a limit on the output.

Cost: see :mod:`hexgen_vllm.policy.shapes`; two quantiles a call.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from hexgen_vllm.policy.calls import NOTHING, Tail
from hexgen_vllm.policy.shapes import Shapes
from hexgen_vllm.policy.workflows import Workflows
from hexgen_vllm.types import NO_DEADLINE, Call, CallResult

FIRST_OUTPUT_GUESS: Final = 256
_LEAST, _USUAL, _MOST = 0.1, 0.5, 0.8
_ERROR_WEIGHT: Final = 0.05
_NO_DEADLINE_TYPE: Final = " batch"  # no name on the wire has a blank


class Outlook(NamedTuple):
    """What to expect of a call.

    Attributes:
        usual_tokens: output length, median.
        most_tokens: output length, 80 % quantile.
        tail: path after it, 80 % quantile.
        least_tail: path after it, 10 % quantile.
        began_s: when the first call of its workflow arrived.
    """

    usual_tokens: int
    most_tokens: int
    tail: Tail
    least_tail: Tail
    began_s: float


class Outlooks:
    """What one engine knows of the lengths and tails of its calls.

    Attributes:
        shapes: what was learned.
        error: mean relative error of the lengths expected lately, ``None`` before the first end.
    """

    def __init__(self) -> None:
        self.shapes = Shapes()
        self._workflows = Workflows(self.shapes)
        self.error: float | None = None

    def opened(self, call: Call, now: float) -> Outlook:
        """Note that ``call`` arrived; return what to expect of it.

        Args:
            call: the call; :func:`without_deadline` gives the type of one without deadline.
            now: the present moment.
        """
        run, seen = self._workflows.arrived(call, now)
        kind, stage = call.learned_as, call.stage
        usual, most = self._lengths(call)
        tail = least_tail = NOTHING
        if not call.final and call.stages_left != 0:
            tail = self.shapes.tail(kind, stage, seen.ordinal, _MOST, call.stages_left)
            least_tail = self.shapes.tail(kind, stage, seen.ordinal, _LEAST, call.stages_left)
        return Outlook(usual, most, tail, least_tail, run.started_s)

    def deadline_s(self, workflow_id: str) -> float:
        """Return the deadline that a call of an open workflow has said, ``inf`` if none has."""
        run = self._workflows.get(workflow_id)
        return NO_DEADLINE if run is None else run.deadline_s

    def _lengths(self, call: Call) -> tuple[int, int]:
        limit = call.max_output_tokens
        said = call.expected_output_tokens
        if said is not None:
            found = [said] * 2
        else:
            learned = (
                self.shapes.output_tokens(call.learned_as, call.stage, q) for q in (_USUAL, _MOST)
            )
            found = [FIRST_OUTPUT_GUESS if one is None else one for one in learned]
        usual, most = (max(one if limit is None else min(one, limit), 1) for one in found)
        return usual, most

    def ended(self, call: Call, expected: int, result: CallResult, now: float) -> None:
        """Learn from a call that ended; one that was not answered in full teaches nothing."""
        self._workflows.ended(call, result, now)
        if result.ok and result.output_tokens:
            error = abs(expected - result.output_tokens) / result.output_tokens
            known = self.error
            self.error = error if known is None else known + _ERROR_WEIGHT * (error - known)

    def expire(self, now: float) -> None:
        """Forget workflows of which nothing was heard for long."""
        self._workflows.expire(now)

    def lengths(self, most: int = 64) -> dict[str, dict[str, dict[str, int]]]:
        """Return what was learned by type and stage: of output lengths the number of samples and
        three quantiles, and the output tokens that follow a call, at two."""
        found: dict[str, dict[str, dict[str, int]]] = {}
        for kind, stages in self.shapes.known_stages().items():
            for stage, samples in stages.items():
                if samples and sum(map(len, found.values())) < most:
                    found.setdefault(kind, {})[stage] = {
                        "samples": samples,
                        **self._of(kind, stage),
                    }
        return found

    def _of(self, kind: str, stage: str) -> dict[str, Any]:
        quantiles = (("p10", _LEAST), ("p50", _USUAL), ("p80", _MOST))
        found = {name: self.shapes.output_tokens(kind, stage, q) for name, q in quantiles}
        for name, q in (("tail_p50", _USUAL), ("tail_p80", _MOST)):
            found[name] = int(self.shapes.tail(kind, stage, 0, q).output_tokens)
        return found


def without_deadline(workflow_type: str) -> str:
    """Return the type under which calls without deadline are learned."""
    return workflow_type + _NO_DEADLINE_TYPE
