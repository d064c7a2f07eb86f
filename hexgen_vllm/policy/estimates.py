"""What a call needs and what follows it: length, tail, when it must end, when it is hopeless."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.policy.calls import NOTHING, Demand, Tail
from hexgen_vllm.policy.claims import due_s
from hexgen_vllm.policy.cost import UNMEASURED
from hexgen_vllm.policy.engine_load import EngineLoad
from hexgen_vllm.policy.overload import hopeless_after
from hexgen_vllm.policy.shapes import Shapes
from hexgen_vllm.policy.workflow import WorkflowRun
from hexgen_vllm.types import NO_DEADLINE, Call

_LEAST_S: Final = 1e-6
_LEAST_QUANTILE: Final = 0.1  # of length and path, for the least time
_SHORT: Final = 0.1  # quantile of length and path of a short workflow
_OF_SHORT: Final = 2.0
_FASTEST_S: Final = 1.0  # seconds for which the fastest step counts as known
_MAX_FASTEST: Final = 256
MANY: Final = 64
"""Engines above which their pace is not found anew for each call."""
PACE_S: Final = 1e-4


class Estimates:
    """Estimates of calls from learned shapes and the engines' rates.

    Args:
        options: quantiles and defaults.
        shapes: what was learned.
        engines: by name; read, never changed.
    """

    def __init__(
        self, options: DispatchOptions, shapes: Shapes, engines: Mapping[str, EngineLoad]
    ) -> None:
        self._options, self._shapes, self._engines = options, shapes, engines
        # By model: when it was found, engines that answer and their decode rates, engines that
        # compute prompts and their prefill rates, summed.
        self._rates: dict[str, tuple[float, int, float, int, float]] = {}
        # By model: when it was found, and the fastest engine's step with one call in it.
        self._fastest: dict[tuple[str, str | None], tuple[float, float]] = {}

    def retuned(self, options: DispatchOptions) -> None:
        """Estimate by other quantiles and defaults from now on."""
        self._options = options

    def demand(self, call: Call, run: WorkflowRun, ordinal: int) -> Demand:
        """Return the estimates of a call.

        Args:
            call: the call.
            run: its workflow, with its deadline.
            ordinal: calls of the same stage that came before it in the workflow.
        """
        output = self.output_tokens(call, ordinal=ordinal)
        tail = self._tail(call, ordinal, self._options.slack_quantile, output)
        tail_s = self._seconds(tail, call)
        if tail is not NOTHING or (call.resume_s and call.stages_left != 0 and not call.final):
            tail_s += max(tail.think_s, call.resume_s or 0.0)
        due = NO_DEADLINE if run.background else due_s(run.ordered_by_s, tail_s, call.arrived_s)
        return Demand(call, output, run.deadline_s, tail_s, due, run.started_s)

    def least_s(self, call: Call, ordinal: int, now: float) -> float:
        """Return T_min: seconds that a call and the path after it take at least.

        Low quantiles, all of the prompt cached, on the fastest engine with nothing else to do. The
        client's own hints make it shorter, never longer.
        """
        output = 1
        q = _LEAST_QUANTILE
        learned = self._shapes.output_tokens(call.learned_as, call.stage, q)
        if learned is not None:
            most = call.max_output_tokens
            output = learned if most is None else max(min(learned, most), 1)
            hint = call.expected_output_tokens
            output = output if hint is None else min(output, hint)
        path = 0.0
        if not call.final:
            tail = self._shapes.tail(call.learned_as, call.stage, ordinal, q, call.stages_left)
            path = tail.output_tokens
        return self._fastest_step_s(call, now) * (output + path)

    def _fastest_step_s(self, call: Call, now: float) -> float:
        bound = (call.model, call.engine)  # to one engine, or to none
        known = self._fastest.get(bound)
        if known is not None and known[0] <= now < known[0] + _FASTEST_S:
            return known[1]
        steps = [
            (e.cost() or UNMEASURED).step_s(1) for e in self._engines.values() if e.serves(call)
        ]
        if len(self._fastest) >= _MAX_FASTEST:
            self._fastest.clear()
        step_s = max(min(steps, default=0.0), 0.0)
        self._fastest[bound] = now, step_s
        return step_s

    def output_tokens(
        self, call: Call, seen: int = 0, q: float | None = None, ordinal: int | None = None
    ) -> int:
        """Return the expected output length of a call that has ``seen`` tokens.

        Args:
            call: the call.
            seen: tokens that it has.
            q: quantile, else that of the options.
            ordinal: calls of the same stage before it in the workflow, if that is to count.
        """
        hint = call.expected_output_tokens
        if hint is not None and hint > seen:
            expected = hint
        else:
            quantile = self._options.length_quantile if q is None else q
            learned = self._shapes.output_tokens(
                call.learned_as, call.stage, quantile, seen, ordinal
            )
            expected = learned or max(self._options.default_output_tokens, seen + 1)
        most = call.max_output_tokens
        return expected if most is None else max(min(expected, most), 1)

    def left_tokens(self, call: Call, ordinal: int) -> float:
        """Return the likely output tokens of a call and of the path after it, 0 if unknown."""
        if not self._known(call):
            return 0.0
        output = self.output_tokens(call, q=0.5)
        return output + self._tail(call, ordinal, 0.5, output).output_tokens

    def hopeless_after_s(self, call: Call, deadline_s: float, ordinal: int, q: float) -> float:
        """Return the moment after which the workflow of a call is given up.

        The ``q`` quantiles of length and tail, on the engine that is best at its present pace, each
        engine as fast as its error allows. What was never seen counts as nothing, an engine whose
        cost is unknown as one that takes no time, so that ignorance demotes nobody.
        """
        output = self.output_tokens(call, q=q) if self._known(call) else 1
        tail = self._tail(call, ordinal, q, output)
        times = [
            0.0
            if (cost := e.least_cost()) is None
            else cost.p1 * (self._uncached(e, call) + tail.prefill_tokens)
            + e.token_s(cost) * (output + tail.output_tokens)
            for e in self._engines.values()
            if e.serves(call)
        ]
        least_s = min(times, default=0.0)
        return hopeless_after(deadline_s, least_s, self._options.hopeless_pace)

    def predicted_s(self, demand: Demand, ordinal: int, held_output_tokens: int) -> float:
        """Return the likely time of a whole workflow from its first call on, at today's pace.

        Each engine is as fast as its error allows. 0 when it cannot be told: where the cost of
        an engine that could serve the call is unknown, for the workflow might be on time there.
        A call of unknown length counts as one token. No more than :data:`_OF_SHORT` times a short
        one of its kind: of work that nobody can foresee the short ones are worth a try.

        Args:
            demand: of the call.
            ordinal: calls of the same stage before it.
            held_output_tokens: output tokens of the calls that wait for room before it.
        """
        ready = self._ready()
        if not ready:
            return 0.0
        call = demand.call
        able = [e.has(call.model) for e in ready]
        if any(has and e.least_cost() is None for e, has in zip(ready, able, strict=True)):
            return 0.0
        token_s = [max(e.token_s(e.least_cost() or UNMEASURED), _LEAST_S) for e in ready]
        # Sums start at 0.0: compiled code takes a sum that starts at 0 for an integer.
        rate = sum(
            (min(e.slots, len(e.in_flight) + 1) / t for e, t in zip(ready, token_s, strict=True)),
            0.0,
        )
        own = demand.output_tokens if self._known(call) else 1
        output = own + self._tail(call, ordinal, 0.5, own).output_tokens
        if self._known(call):
            short = self.output_tokens(call, q=_SHORT, ordinal=ordinal)
            short_path = self._tail(call, ordinal, _SHORT, short).output_tokens
            output = min(output, _OF_SHORT * (short + short_path))
        own_s = [t for t, has in zip(token_s, able, strict=True) if has] or token_s
        pace_s = len(own_s) / sum((1.0 / t for t in own_s), 0.0)
        return held_output_tokens / rate + output * pace_s

    def fullness(self) -> float:
        """Return how full the engines at work are, 0 to 1; larger ones count for more."""
        ready = self._ready()
        slots = sum(engine.slots for engine in ready)
        full = sum((engine.fullness() * engine.slots for engine in ready), 0.0)
        return full / slots if slots else 1.0

    def work_s(self, demand: Demand) -> float:
        """Return the seconds of work left on a call and the path after it."""
        return demand.tail_s + self.own_s(demand)

    def own_s(self, demand: Demand) -> float:
        """Return the seconds that a call itself takes at the fleet's present pace."""
        return self._seconds(Tail(1.0, 0.0, demand.output_tokens), demand.call)

    def _known(self, call: Call) -> bool:
        if call.expected_output_tokens is not None:
            return True
        return self._shapes.output_tokens(call.learned_as, call.stage, 0.5) is not None

    @staticmethod
    def _uncached(engine: EngineLoad, call: Call) -> int:
        return max(call.prompt_tokens - engine.prefixes.match(call), 1)

    def _tail(self, call: Call, ordinal: int, q: float, output: int) -> Tail:
        if call.final or call.resume_s == 0.0:
            return NOTHING
        tail = self._shapes.tail(call.learned_as, call.stage, ordinal, q, call.stages_left)
        if tail is NOTHING and call.stages_left:
            n = call.stages_left
            return Tail(n, n * call.prompt_tokens, n * output)
        return tail

    def _ready(self, model: str | None = None) -> list[EngineLoad]:
        """Return the engines at work that have ``model``, or any."""
        ready = [e for e in self._engines.values() if e.at_work and e.answers]
        return ready if model is None else [e for e in ready if e.has(model)]

    def _seconds(self, tail: Tail, call: Call) -> float:
        """Return the time of a path at the fleet's present pace (harmonic mean of engines).

        What follows a call is taken to need the call's own model. The pace of many engines is
        found anew every :data:`PACE_S` seconds per engine.
        """
        if tail is NOTHING:
            return 0.0
        now, model = call.arrived_s, call.model
        known = self._rates.get(model) if len(self._engines) > MANY else None
        if known is None or not known[0] <= now < known[0] + PACE_S * len(self._engines):
            known = (now, *self._pace(model))
            if len(self._rates) >= _MAX_FASTEST:
                self._rates.clear()
            self._rates[model] = known
        _, n, decode_rate, prefills, prefill_rate = known
        if not n:
            return 0.0
        prefill_s = tail.prefill_tokens * prefills / prefill_rate
        return tail.output_tokens * n / decode_rate + prefill_s

    def _pace(self, model: str) -> tuple[int, float, int, float]:
        """Return the engines at work that have ``model`` and answer, and their decode rates.

        Then those that compute prompts, and their prefill rates: engines for decode only where
        there are no others.
        """
        decode_rate, prefill_rate, ready, prefills = 0.0, 0.0, 0, 0
        able = [e for e in self._engines.values() if e.at_work and e.computes(model)]
        decodes_only = all(e.decodes_only for e in able)
        for engine in able:
            cost = engine.cost() or UNMEASURED
            if engine.answers:
                ready += 1
                batch = min(engine.slots, len(engine.in_flight) + 1)
                decode_rate += 1.0 / max(cost.step_s(batch), _LEAST_S)
            if decodes_only or not engine.decodes_only:
                prefills += 1
                prefill_rate += 1.0 / max(cost.p1, 1e-9)
        return ready, decode_rate, prefills, prefill_rate
