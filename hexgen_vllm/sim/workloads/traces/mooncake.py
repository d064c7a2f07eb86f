"""Mooncake's format and its relatives: one JSON line for each request, with hashes of its blocks.

- Mooncake: ``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids`` of 512 tokens.
  Rows of one ``session_id`` follow each other, ``delay`` ms after the end of the one before.
- Agentic Mooncake: rows with a ``request_id`` that wait for others. Version 1 has ``wait_for``, and
  ``delay`` and ``tool_wait_ms`` after them; version 2 begins with a header, its rows have a
  ``play_id`` and ``dependencies``.
- Bailian: ``timestamp`` (s), ``chat_id``, ``parent_chat_id``, ``hash_ids`` of 16 tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.sim.workloads.traces.lines import Row
from hexgen_vllm.sim.workloads.traces.model import Open, TraceCall, TraceWorkflow, in_order

MOONCAKE_TOKENS: Final = 512
BAILIAN_TOKENS: Final = 16
AGENTIC_SCHEMA: Final = "dynamo.agentic_mooncake"
_AGENTIC_KEYS: Final = ("wait_for", "dependencies", "play_id", "not_before_ms", "tool_wait_ms")


def is_agentic(data: dict[str, Any]) -> bool:
    """Return whether a first row is of agentic Mooncake."""
    if data.get("schema") == AGENTIC_SCHEMA:
        return True
    return "request_id" in data and any(key in data for key in _AGENTIC_KEYS)


def _call(row: Row, stage: str) -> TraceCall | None:
    """Return the call of a row, ``None`` for one that was not answered."""
    prompt = row.tokens(row.first("input_length", "input_tokens"))
    output = row.tokens(row.first("output_length", "output_tokens"))
    if not prompt or not output:
        return None
    return TraceCall(stage, prompt, output, blocks=row.hashes("hash_ids"))


def read_mooncake(rows: Iterable[Row], silence_s: float, block: int) -> Iterator[TraceWorkflow]:
    """Yield the workflows of plain Mooncake."""
    block = block or MOONCAKE_TOKENS
    sessions = Open(silence_s)
    sent_ms: dict[str, float] = {}
    for row in rows:
        session = row.text("session_id", "")
        call = _call(row, "chat")
        if call is None:
            continue
        at_ms = row.number(row.first("timestamp", "created_time"), None)
        if not session:
            call.start_s = None if at_ms is None else at_ms / 1e3
            name = row.text("request_id", "request")
            yield TraceWorkflow(name, "mooncake", [call], call.start_s, block_tokens=block)
            continue
        delay_ms = row.number(row.first("delay", "delay_ms"), None, 0.0)
        before_ms = sent_ms.get(session)
        if delay_ms is None:
            known = at_ms is not None and before_ms is not None
            delay_ms = max(at_ms - before_ms, 0.0) if known else 0.0
        if at_ms is None:
            at_ms = (before_ms or 0.0) + delay_ms
        sent_ms[session] = at_ms
        yield from sessions.over(session, at_ms / 1e3)
        call.start_s = at_ms / 1e3
        workflow = sessions.get(session)
        if workflow is None:
            workflow = TraceWorkflow(session, "mooncake", [], call.start_s, block_tokens=block)
        else:
            call.after, call.think_s = (len(workflow.calls) - 1,), delay_ms / 1e3
        workflow.calls.append(call)
        sessions.keep(session, workflow, at_ms / 1e3)
    yield from sessions.rest()


def read_bailian(rows: Iterable[Row], silence_s: float, block: int) -> Iterator[TraceWorkflow]:
    """Yield the conversations of Bailian's traces; each turn waits for the one it answers."""
    chats = Open(silence_s)
    place: dict[str, tuple[str, int, float]] = {}  # of a chat: its root, its turn there, its moment
    for row in rows:
        call = _call(row, row.text("type", "chat"))
        chat, parent = row.text("chat_id"), row.text("parent_chat_id", "-1")
        at_s = row.number("timestamp")
        if call is None:
            continue
        call.start_s = at_s
        known = place.get(parent) if parent != "-1" else None
        root = known[0] if known is not None else chat
        yield from chats.over(root, at_s)
        workflow = chats.get(root)
        if workflow is None:
            root = chat
            workflow = TraceWorkflow(
                chat, "bailian", [], at_s, block_tokens=block or BAILIAN_TOKENS
            )
        elif known is not None:
            call.after, call.think_s = (known[1],), max(at_s - known[2], 0.0)
        place[chat] = root, len(workflow.calls), at_s
        workflow.calls.append(call)
        chats.keep(root, workflow, at_s)
        if len(place) > 4 * _REMEMBERED:
            for old in list(place)[:_REMEMBERED]:
                del place[old]
    yield from chats.rest()


_REMEMBERED: Final = 250_000


class _Plays:
    """Workflows of agentic rows, which name what they wait for."""

    def __init__(self, silence_s: float, block: int, *, local: bool) -> None:
        self.open = Open(silence_s)
        self.block, self.local = block, local
        self.place: dict[str, tuple[str, TraceCall]] = {}  # of a request: its key, itself
        self.left = False  # whether a workflow was let go before the end

    def add(
        self, row: Row, call: TraceCall, key: str, waits: list[str], at_s: float
    ) -> Iterator[TraceWorkflow]:
        """Take in a call; yield workflows that are over."""
        request = row.text("request_id")
        if request in self.place:
            raise ConfigError(f'{row.where}: "request_id" {request!r} is there twice.')
        for over in self.open.over(key, at_s):
            self.left = True
            self._forget(over)
            yield over
        for other in waits:
            known = self.place.get(other)
            if known is None:
                if not self.left:
                    raise ConfigError(
                        f"{row.where} waits for {other!r}, which is not there before it."
                    )
                continue
            if known[0] != key and self.open.get(known[0]) is not None:
                if self.open.get(key) is None:
                    key = known[0]
                else:
                    self._join(key, known[0])
        workflow = self.open.get(key)
        if workflow is None:
            workflow = TraceWorkflow(
                key, "agent", [], at_s, block_tokens=self.block, local=self.local
            )
        calls = {id(one): index for index, one in enumerate(workflow.calls)}
        after = (calls.get(id(self.place[other][1])) for other in waits if other in self.place)
        call.after = tuple(sorted({index for index in after if index is not None}))
        workflow.calls.append(call)
        self.place[request] = key, call
        self.open.keep(key, workflow, at_s)

    def _join(self, key: str, other: str) -> None:
        self.open.join(key, other)
        for request, (where, call) in list(self.place.items()):
            if where == other:
                self.place[request] = key, call

    def _forget(self, workflow: TraceWorkflow) -> None:
        gone = set(map(id, workflow.calls))
        self.place = {name: at for name, at in self.place.items() if id(at[1]) not in gone}


def read_agentic(rows: Iterable[Row], silence_s: float, block: int) -> Iterator[TraceWorkflow]:
    """Yield the workflows of agentic Mooncake, version 1 or 2."""
    plays: _Plays | None = None
    dispatch: dict[
        str, tuple[list[str], float]
    ] = {}  # of a request: what it waits for, and how long
    where = ""
    for row in rows:
        where = row.where
        if row.data.get("schema") == AGENTIC_SCHEMA:
            if row.tokens("version") != 2:
                raise row.error("version", "2")
            local = row.text("hash_id_scope", "local") == "local"
            plays = _Plays(silence_s, block or row.tokens("block_size"), local=local)
            continue
        plays = plays or _Plays(silence_s, block or MOONCAKE_TOKENS, local=False)
        request = row.text("request_id")
        call = _call(row, row.text("stage", "") or row.text("model", "") or "agent")
        if call is None:
            raise ConfigError(f"{row.where}: a request needs at least 1 input and 1 output token.")
        call.thread = row.text("session_id", request)
        if "play_id" in row.data or "dependencies" in row.data:
            waits, think_s = _dependencies(row, dispatch)
            at_s = row.number("not_before_ms", 0.0) / 1e3
            if waits:
                at_s = plays.open.newest_s
            key = row.text("play_id", request)
        else:
            waits = row.names("wait_for")
            wait_ms = row.number(row.first("delay", "delay_ms"), 0.0, 0.0)
            think_s = (wait_ms + row.number("tool_wait_ms", 0.0, 0.0)) / 1e3
            moment_ms = row.number(row.first("timestamp", "created_time"), None)
            at_s = plays.open.newest_s if moment_ms is None else moment_ms / 1e3
            key = call.thread
        call.start_s, call.think_s = at_s, think_s if waits else 0.0
        for over in plays.add(row, call, key, waits, at_s):
            yield _finished(over, where)
        if "play_id" in row.data or "dependencies" in row.data:
            dispatch[request] = waits, think_s
    for over in plays.open.rest() if plays is not None else ():
        yield _finished(over, where)


def _dependencies(
    row: Row, dispatch: dict[str, tuple[list[str], float]]
) -> tuple[list[str], float]:
    """Return what a row of version 2 waits for, and for how long after the last of that.

    Recorded delays count from each to the start; that from the last to end is the shortest. What
    waits for another's sending waits for what that one waits for.
    """
    waits: list[str] = []
    delays: list[float] = []
    for item in row.rows("dependencies", needed=False):
        other, delay_s = item.text("request_id"), item.number("delay_ms", 0.0, 0.0) / 1e3
        if item.text("trigger", "completion") == "dispatch":
            before, think_s = dispatch.get(other, ([], 0.0))
            waits.extend(before)
            delays.append(think_s + delay_s)
        else:
            waits.append(other)
            delays.append(delay_s)
    return list(dict.fromkeys(waits)), min(delays, default=0.0)


def _finished(workflow: TraceWorkflow, where: str) -> TraceWorkflow:
    workflow = in_order(workflow, where)
    roots = [call.start_s for call in workflow.calls if not call.after and call.start_s is not None]
    workflow.arrived_s = min(roots, default=None)
    for call in workflow.calls:
        if not call.after and call.start_s is not None and workflow.arrived_s is not None:
            call.think_s = call.start_s - workflow.arrived_s
    return workflow


class AgenticWriter:
    """Writes agentic Mooncake: rows of both versions at once, with a header for version 2.

    Args:
        write: takes text.
        header: whether readers of version 2 are to read it; those of version 1 know no header.
    """

    def __init__(self, write: Callable[[str], object], *, header: bool = True) -> None:
        self._write, self._header = write, header
        self._block = 0
        self._count = 0
        self._ids: dict[tuple[int, int], int] = {}

    def add(self, workflow: TraceWorkflow) -> None:
        """Write a workflow; all must have blocks of one size.

        Raises:
            ConfigError: the size is another than before.
        """
        if not self._count:
            self._block = workflow.block_tokens
            if self._header:
                self._line({
                    "schema": AGENTIC_SCHEMA, "version": 2, "block_size": self._block,
                    "hash_id_scope": "local",
                    "source": {"format": "hexgen-vllm", "digest": "none"},
                })  # fmt: skip
        elif workflow.block_tokens != self._block:
            raise ConfigError(
                f"workflow {workflow.name} has blocks of {workflow.block_tokens} tokens, others of "
                f"{self._block}: agentic Mooncake needs one size."
            )
        number, self._count = self._count, self._count + 1
        arrived_ms = 1e3 * (workflow.arrived_s or 0.0)
        names = [f"w{number}.{index}" for index in range(len(workflow.calls))]
        scope = number if workflow.local else -1
        for index, call in enumerate(workflow.calls):
            waits = [names[before] for before in call.after]
            think_ms = round(1e3 * call.think_s, 3)
            begins_ms = arrived_ms if waits else arrived_ms + think_ms
            start_ms = begins_ms if call.start_s is None else 1e3 * call.start_s
            self._line({
                "request_id": names[index],
                "play_id": f"w{number}",
                "session_id": f"w{number}:{call.thread}" if call.thread else f"w{number}",
                "model": "unknown",
                "stage": call.stage,
                "input_length": call.prompt,
                "output_length": call.output,
                "hash_ids": [self._id(scope, block) for block in call.blocks],
                "timestamp": round(max(start_ms, begins_ms), 3),
                "not_before_ms": 0.0 if waits else round(begins_ms, 3),
                "wait_for": waits,
                "delay": think_ms if waits else 0.0,
                "dependencies": [
                    {
                        "request_id": name, "trigger": "completion", "delay_ms": think_ms,
                        "relation": "sequence" if len(waits) == 1 else "join",
                    }
                    for name in waits
                ],
            })  # fmt: skip

    def _id(self, scope: int, block: int) -> int:
        return self._ids.setdefault((scope, block), len(self._ids))

    def _line(self, data: dict[str, Any]) -> None:
        self._write(json.dumps(data, separators=(",", ":")) + "\n")
