"""Drives the coordinator: requests become events, decisions wake the requests they are about.

Everything here runs in one event loop and does not wait between reading and changing state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import replace

from hexgen_vllm.clock import Clock
from hexgen_vllm.errors import Refused
from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.policy.engine_load import Elsewhere
from hexgen_vllm.router.errors import Outcome, refused
from hexgen_vllm.router.observe.ledger import Ledger
from hexgen_vllm.types import (
    Call,
    CallResult,
    Decision,
    EngineReport,
    EngineSpec,
    EngineState,
    Placement,
    Rejection,
)


class Service:
    """The coordinator in real time.

    Args:
        coordinator: the state machine.
        clock: its time.
        ledger: where placements are counted.
    """

    def __init__(self, coordinator: Coordinator, clock: Clock, ledger: Ledger) -> None:
        self.coordinator = coordinator
        self.clock = clock
        self._ledger = ledger
        self._waiting: dict[str, asyncio.Future[Placement]] = {}  # calls without a decision

    @property
    def waiting(self) -> int:
        """Calls that wait for a decision."""
        return len(self._waiting)

    async def place(self, call: Call) -> Placement:
        """Wait until ``call`` may be sent, and return where to.

        The caller must end every call with :meth:`finished`, also one that was refused.

        Raises:
            Refused: nobody can take it, too many calls wait, or it waited too long.
        """
        if call.root is not None:
            call = self.coordinator.workflows.inherited(call)
        arrived = self.coordinator.call_arrived(call, self.clock.now())
        decision = self._carry_out(arrived, call.call_id)
        if isinstance(decision, Placement):
            return decision
        return await self._decided(call.call_id, decision)

    async def replace(self, call_id: str) -> Placement:
        """Return where else to send a call whose engine failed, or the rest of it.

        Raises:
            Refused: there is nowhere else; the call has then ended.
        """
        if self.coordinator.in_flight(call_id) is None:  # no decision would ever come
            raise refused(Outcome.NO_ENDPOINTS)
        bounced = self.coordinator.call_bounced(call_id, self.clock.now())
        return await self._decided(call_id, self._carry_out(bounced, call_id))

    def prefilled(self, call_id: str, result: CallResult) -> None:
        """Note that a prefill engine is done with the prompt of a call, well or not."""
        now = self.clock.now()
        self._carry_out(self.coordinator.call_prefilled(call_id, result, now))

    def started(self, call_id: str) -> None:
        """Note the first token of a call."""
        self.coordinator.call_started(call_id, self.clock.now())

    def progressed(self, call_id: str, output_tokens: int) -> None:
        """Note how many tokens a call has so far."""
        self.coordinator.call_progressed(call_id, output_tokens, self.clock.now())

    def finished(self, call_id: str, result: CallResult) -> None:
        """Note that a call ended; harmless for one that has ended before."""
        decisions = self.coordinator.call_finished(call_id, result, self.clock.now())
        if decisions:
            self._carry_out(decisions)

    def workflow_finished(self, workflow_id: str) -> None:
        """Note the client's word that a workflow is over."""
        self.coordinator.workflow_finished(workflow_id)

    def retune(self, values: Mapping[str, float]) -> None:
        """Turn knobs of the placement policy in force, by option name."""
        options = replace(self.coordinator.options, **values)  # type: ignore[arg-type]
        self._carry_out(self.coordinator.retune(options, self.clock.now()))

    def engine_joined(self, spec: EngineSpec, state: EngineState = EngineState.READY) -> None:
        """Note an engine that is up, or up again after a restart."""
        self._carry_out(self.coordinator.engine_joined(spec, self.clock.now(), state))

    def engine_serves(self, engine_id: str, models: frozenset[str]) -> None:
        """Note that an engine has other models than before."""
        self._carry_out(self.coordinator.engine_serves(engine_id, models, self.clock.now()))

    def engine_left(self, engine_id: str) -> None:
        """Note that an engine is no more."""
        self._ledger.engine_left(engine_id)
        self._carry_out(self.coordinator.engine_left(engine_id, self.clock.now()))

    def engine_changed(self, engine_id: str, state: EngineState) -> None:
        """Note that an engine, joined before, changed its state."""
        now = self.clock.now()
        self._carry_out(self.coordinator.engine_changed(engine_id, state, now))

    def engine_reported(self, engine_id: str, report: EngineReport) -> None:
        """Take in telemetry."""
        self.coordinator.engine_reported(engine_id, report, self.clock.now())

    def placed_elsewhere(self, source: str, loads: Mapping[str, Elsewhere]) -> None:
        """Take in what calls others have on the engines, in place of what ``source`` told last."""
        now = self.clock.now()
        self._carry_out(self.coordinator.placed_elsewhere(source, loads, now))

    def tick(self) -> None:
        """Do what time alone causes; call it about once a second or more often."""
        self._carry_out(self.coordinator.tick(self.clock.now()))

    def refuse_waiting(self, error: Refused) -> None:
        """Turn away every call that waits for a decision."""
        for future in self._waiting.values():
            _refuse(future, error)

    async def _decided(self, call_id: str, at_once: Decision | None) -> Placement:
        """Return where to send a call, now or when it is known."""
        if isinstance(at_once, Placement):
            return at_once
        if at_once is not None:
            raise _refusal(at_once)
        future: asyncio.Future[Placement] = asyncio.get_running_loop().create_future()
        self._waiting[call_id] = future
        try:
            return await future
        finally:
            del self._waiting[call_id]
            future.cancel()  # an error that comes too late is nobody's

    def _carry_out(self, decisions: Iterable[Decision], asks: str | None = None) -> Decision | None:
        """Carry out ``decisions``; return the one about the call that ``asks``, if there is one."""
        own = None
        for decision in decisions:
            if isinstance(decision, Placement):
                self._ledger.placements[decision.engine_id, decision.reason] += 1
                if decision.prefill is not None:
                    half = decision.prefill
                    self._ledger.placements[half.engine_id, half.reason] += 1
            if decision.call_id == asks:
                own = decision
                continue
            future = self._waiting.get(decision.call_id)
            if future is not None and not future.done():
                _settle(future, decision)
        return own


def _settle(future: asyncio.Future[Placement], decision: Decision) -> None:
    if isinstance(decision, Rejection):
        _refuse(future, _refusal(decision))
    else:
        future.set_result(decision)


def _refusal(decision: Rejection) -> Refused:
    return Refused(
        decision.message,
        reason=decision.reason,
        status=decision.status,
        retry_after_s=decision.retry_after_s,
    )


def _refuse(future: asyncio.Future[Placement], error: Refused) -> None:
    if not future.done():
        future.set_exception(error)
