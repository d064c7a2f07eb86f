"""What comes after a call: the remaining critical path, learned per workflow type.

A finished workflow teaches, for each of its calls, which work lay on the critical path after it.
Call j comes after call i when j arrived once i had ended; the path after i is the heaviest chain
of such calls. That needs no declared graph, and parallel siblings count once, by the heavier.

Samples are kept per (type, stage, how many calls of that stage came before). So after two
``revise`` rounds the estimate is the distribution of what was left in workflows that had come
that far: the posterior of the retry depth, which explains 70 to 76 % of the variance of the
critical path in the published text-to-SQL traces, needs no model of its own. Thin evidence
backs off to (type, stage), then to the type, then to the client's hint ``stages_left``.

Cost: a finished workflow of n calls costs O(n log n); reading is O(1).

What was seen is kept in bounded windows with exact quantiles.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from heapq import nlargest
from itertools import islice
from typing import Any, Final, Generic, NamedTuple, Protocol, TypeVar

from hexgen_vllm.policy.calls import Tail
from hexgen_vllm.types import NO_DEADLINE, OF, Call, CallResult

_FEW: Final = 16  # up to so many new samples are put in their places one by one
NOTHING: Final = Tail(0.0, 0.0, 0.0)
_ENOUGH: Final = 8
_ORDINALS: Final = 8  # calls of a stage in a workflow whose lengths are learned one by one
_ENOUGH_LENGTHS: Final = 32
_MAX_KEYS: Final = 4096
_MAX_CALLS: Final = 256  # calls of one workflow that teach
_MAX_ENDED: Final = 4096  # workflows that ended, of which others are to be told
# Weight of one prompt token against one output token when paths are compared. Published device
# rates give 1/90 to 1/170 (prefill 1.2-11.5 k tokens/s against 11.5-40 ms a decode step).
PREFILL_WEIGHT: Final = 0.01
# Fixed weight of a call, in output tokens: queueing and hops.
CALL_WEIGHT: Final = 2.0


class Ordered(Protocol):
    """Anything with a total order among its own kind."""

    def __lt__(self, other: Any, /) -> bool:
        """Return whether self sorts before ``other``."""
        ...


S = TypeVar("S", bound=Ordered)


class Window(Generic[S]):
    """The last ``size`` samples, sorted when they are read.

    Adding costs O(1), as most windows are added to more often than they are read. Reading a
    quantile costs O(size) moves of pointers for each sample since the last time, at most a sort.
    """

    def __init__(self, size: int = 256) -> None:
        self._by_age: deque[S] = deque()
        self._by_value: list[S] = []  # without the newest ``_new`` samples
        self._gone: list[S] = []  # in it still, though too old
        self._new = 0
        self._size = size

    def __len__(self) -> int:
        return len(self._by_age)

    def newest(self, most: int) -> list[S]:
        """Return up to ``most`` samples, the oldest of them first."""
        return list(islice(self._by_age, max(len(self._by_age) - most, 0), None))

    def add(self, sample: S) -> None:
        """Take in ``sample``; the oldest goes when the window is full."""
        if len(self._by_age) == self._size:
            oldest = self._by_age.popleft()
            if self._new < self._size:
                self._gone.append(oldest)
            else:
                self._new -= 1  # it was never put in its place
        self._by_age.append(sample)
        self._new += 1

    def _ordered(self) -> list[S]:
        found = self._by_value
        if self._new > _FEW:
            found = self._by_value = sorted(self._by_age)
        else:
            for sample in self._gone:
                del found[bisect_left(found, sample)]
            for index in range(len(self._by_age) - self._new, len(self._by_age)):
                insort(found, self._by_age[index])
        self._gone.clear()
        self._new = 0
        return found

    def quantile(self, q: float) -> S:
        """Return the sample below which a share ``q`` of the others lies (nearest rank).

        Raises:
            IndexError: the window is empty.
        """
        found = self._ordered() if self._new else self._by_value
        return found[min(int(q * len(found)), len(found) - 1)]

    def above(self, floor: S, q: float) -> S | None:
        """Return the ``q`` quantile of the samples larger than ``floor``, ``None`` if none is.

        This is the estimate of a length once ``floor`` of it has been seen.
        """
        found = self._ordered()
        low = bisect_left(found, floor)
        while low < len(found) and not floor < found[low]:
            low += 1
        rest = len(found) - low
        if rest == 0:
            return None
        return found[low + min(int(q * rest), rest - 1)]


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
    """A workflow that has begun (mutable, owned by :class:`Workflows`)."""

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


class WorkflowPart(NamedTuple):
    """What one coordinator tells others of a workflow: how it stands, and the calls that changed.

    Attributes:
        workflow_id, workflow_type, learned_as, started_s, last_seen_s, turn, asked,
            asked_s, deadline_s, ordered_by_s, background, engine, prefix, chunk_tokens: as of
            :class:`WorkflowRun`.
        calls: that came or ended since it was told last, by names that no others have.
        gone: calls that failed since: they leave no trace.
        over: it has ended.
    """

    workflow_id: str
    workflow_type: str
    learned_as: str
    started_s: float
    last_seen_s: float
    turn: int
    asked: bool
    asked_s: float
    deadline_s: float
    ordered_by_s: float
    background: bool
    engine: str
    prefix: tuple[int, ...]
    chunk_tokens: int
    calls: dict[str, SeenCall]
    gone: tuple[str, ...]
    over: bool


class _TailSample(NamedTuple):
    weight: float
    tail: Tail


class _Stats:
    """Samples under one key."""

    __slots__ = ("outputs", "tails")

    def __init__(self) -> None:
        self.tails: Window[_TailSample] = Window()
        self.outputs: Window[int] = Window()

    @property
    def samples(self) -> int:
        """How many there are."""
        return len(self.outputs) + len(self.tails)


class Shapes:
    """What workflows of each type looked like.

    Args:
        max_keys: bound on remembered (type, stage, ordinal) keys; one long unused goes first, of
            the tenant that has most where types belong to tenants.
    """

    def __init__(self, max_keys: int = _MAX_KEYS) -> None:
        self._stats: dict[tuple[str, ...], _Stats] = {}
        self._by_owner: dict[str, OrderedDict[tuple[str, ...], None]] = {}  # oldest first
        self._max_keys = max_keys

    def _touch(self, key: tuple[str, ...]) -> _Stats:
        stats = self._stats.get(key)
        if stats is None:
            stats = self._stats[key] = _Stats()
            self._by_owner.setdefault(_owner(key), OrderedDict())[key] = None
            if len(self._stats) > self._max_keys:
                self._forget_one()
        elif len(self._stats) > self._max_keys // 2:  # long before any has to go
            self._by_owner[_owner(key)].move_to_end(key)
        return stats

    def _forget_one(self) -> None:
        """Nobody who makes types up takes the place of other tenants' types."""
        most = max(self._by_owner.values(), key=len)
        key, _ = most.popitem(last=False)
        del self._stats[key]

    @staticmethod
    def _keys(workflow_type: str, stage: str, ordinal: int) -> tuple[tuple[str, ...], ...]:
        return (
            (workflow_type, stage, str(ordinal)),
            (workflow_type, stage),
            (workflow_type,),
        )

    def learn_output(
        self, workflow_type: str, stage: str, output_tokens: int, ordinal: int | None = None
    ) -> None:
        """Take in the true output length of a call, and as which of its stage it came."""
        if ordinal is not None and ordinal < _ORDINALS:
            self._touch((workflow_type, stage, str(ordinal))).outputs.add(output_tokens)
        for key in ((workflow_type, stage), (workflow_type,)):
            self._touch(key).outputs.add(output_tokens)

    def learn(self, run: WorkflowRun) -> None:
        """Take in what followed each call of a workflow that ended."""
        ended = [c for c in run.calls.values() if c.ended_s is not None]
        for call, tail in zip(ended, tails(ended), strict=True):
            sample = _TailSample(path_weight(tail), tail)
            kind = run.learned_as or run.workflow_type
            for key in self._keys(kind, call.stage, call.ordinal):
                self._touch(key).tails.add(sample)

    def output_tokens(
        self, workflow_type: str, stage: str, q: float, seen: int = 0, ordinal: int | None = None
    ) -> int | None:
        """Return the ``q`` quantile of output length given ``seen`` tokens; ``None`` if unknown.

        Args:
            workflow_type: type of the workflow.
            stage: stage of the call.
            q: quantile in [0, 1].
            seen: tokens that it has.
            ordinal: calls of this stage that came before it in the workflow; those that came so
                count alone, once there are enough. Siblings often have prompts of their own kind.
        """
        if ordinal is not None and not seen:
            stats = self._stats.get((workflow_type, stage, str(ordinal)))
            if stats is not None and len(stats.outputs) >= _ENOUGH_LENGTHS:
                return stats.outputs.quantile(q)
        for key in ((workflow_type, stage), (workflow_type,)):
            stats = self._stats.get(key)
            if stats is None or not len(stats.outputs):
                continue
            found = stats.outputs.above(seen, q) if seen else stats.outputs.quantile(q)
            # Longer than any before: the longest seen says nothing, expect half as much again.
            return found if found is not None else seen + max(seen // 2, 1)
        return None

    def tail(
        self, workflow_type: str, stage: str, ordinal: int, q: float, stages_left: int | None = None
    ) -> Tail:
        """Return the ``q`` quantile of the critical path after a call.

        Args:
            workflow_type: type of the workflow.
            stage: stage of the call.
            ordinal: calls of this stage that came before it in the workflow.
            q: quantile in [0, 1]; 0.5 for routing, 0.8 to 0.9 for slack.
            stages_left: the client's hint; 0 means nothing follows, and it is believed.
        """
        if stages_left == 0:
            return NOTHING
        thin: _Stats | None = None
        for key in self._keys(workflow_type, stage, ordinal):
            stats = self._stats.get(key)
            if stats is None or not len(stats.tails):
                continue
            if len(stats.tails) >= _ENOUGH:
                return stats.tails.quantile(q).tail
            thin = stats
        if thin is not None:
            return thin.tails.quantile(q).tail
        return NOTHING

    def export(self, most_keys: int = 512, most_samples: int = 64) -> list[dict[str, Any]]:
        """Return the newest samples of the keys that have most, as plain JSON values."""
        keys = nlargest(most_keys, self._stats, key=lambda key: self._stats[key].samples)
        return [
            {
                "key": list(key),
                "outputs": stats.outputs.newest(most_samples),
                "tails": [list(sample.tail) for sample in stats.tails.newest(most_samples)],
            }
            for key in keys
            for stats in (self._stats[key],)
        ]

    def restore(self, exported: object) -> None:
        """Take in what :meth:`export` returned; nothing of it if any of it is wrong.

        Raises:
            ValueError: it is not what :meth:`export` returns.
        """
        found = [_exported(one) for one in exported] if isinstance(exported, list) else None
        if found is None or len(found) > self._max_keys:
            raise ValueError("not a list of learned shapes")
        for key, outputs, tails_ in found:
            stats = self._touch(key)
            for tokens in outputs:
                stats.outputs.add(tokens)
            for tail in tails_:
                stats.tails.add(_TailSample(path_weight(tail), tail))

    def known_stages(self) -> dict[str, dict[str, int]]:
        """Return, per workflow type and stage, the number of remembered output lengths."""
        known: dict[str, dict[str, int]] = {}
        for key, stats in self._stats.items():
            if len(key) == 2:  # (type, stage)
                known.setdefault(key[0], {})[key[1]] = len(stats.outputs)
        return known


def _owner(key: tuple[str, ...]) -> str:
    return key[0].partition(OF)[2]


def _exported(value: object) -> tuple[tuple[str, ...], list[int], list[Tail]]:
    """Return key, output lengths and tails of one exported entry.

    Raises:
        ValueError: it is not one.
    """
    if not isinstance(value, dict) or set(value) != {"key", "outputs", "tails"}:
        raise ValueError("not a learned shape")
    key, outputs, paths = value["key"], value["outputs"], value["tails"]
    if not all(isinstance(one, list) for one in (key, outputs, paths)):
        raise ValueError("not a learned shape")
    if not 1 <= len(key) <= 3 or not all(isinstance(name, str) for name in key):
        raise ValueError("not the key of a learned shape")
    if not all(type(tokens) is int and tokens >= 0 for tokens in outputs):
        raise ValueError("not output lengths")
    return tuple(key), outputs, [_tail(path) for path in paths]


def _tail(path: object) -> Tail:
    if not isinstance(path, list) or not 3 <= len(path) <= 4:  # 3 without think time
        raise ValueError("not a path")
    for number in path:
        if type(number) not in (int, float) or not 0.0 <= number < math.inf:
            raise ValueError("not a path")
    return Tail(*map(float, path))


def path_weight(tail: Tail) -> float:
    """Return the work of a path in output tokens, for comparing paths."""
    return tail.output_tokens + PREFILL_WEIGHT * tail.prefill_tokens + CALL_WEIGHT * tail.calls


def tails(calls: list[SeenCall]) -> list[Tail]:
    """Return for each ended call the heaviest chain of calls that came after it.

    A call's think time is what passed since the last end before it came, whichever call's.

    Args:
        calls: ended calls of one workflow, in any order.

    Returns:
        One path per call, in the same order.
    """
    after = [NOTHING] * len(calls)
    ends = sorted(call.ended_s for call in calls if call.ended_s is not None)
    # From the last arrival back: the arrivals, negated to ascend, and the heaviest chain that
    # starts with one of the calls so far. Those that came after an end are the first few of them.
    arrivals: list[float] = []
    chains: list[tuple[float, Tail]] = []
    for i in sorted(range(len(calls)), key=lambda i: calls[i].arrived_s, reverse=True):
        call = calls[i]
        count = 0 if call.ended_s is None else bisect_right(arrivals, -call.ended_s)
        weight, path = chains[count - 1] if count else (0.0, NOTHING)
        after[i] = path
        weight += call.weight()
        heavier = not chains or weight > chains[-1][0]
        if heavier:
            before = bisect_right(ends, call.arrived_s)
            think_s = call.arrived_s - ends[before - 1] if before else 0.0
            chains.append((weight, _extended(path, call, think_s)))
        else:
            chains.append(chains[-1])
        arrivals.append(-call.arrived_s)
    return after


def _extended(path: Tail, call: SeenCall, think_s: float) -> Tail:
    return Tail(
        path.calls + 1,
        path.prefill_tokens + call.uncached_tokens,
        path.output_tokens + call.output_tokens,
        path.think_s + think_s,
    )


class Workflows:
    """Workflows that have begun and not ended, and the shapes learned from those that have.

    A workflow ends when its client says so, or when nothing was heard of it for ``idle_s``.

    Several coordinators can tell each other of theirs (:meth:`share`, :meth:`changes`,
    :meth:`heard`): a workflow whose next call comes here goes on here, with its deadline and what
    it has done. What each knows is the union of all that is told, in whatever order. It is open
    where its last call came, and ends, counts and is logged there; all learn from it.

    Args:
        shapes: where endings teach.
        idle_s: seconds of silence after which a workflow counts as ended.
        max_open: bound on open workflows. The longest silent one is ended first; if none is
            silent, the one whose last call came first.
    """

    def __init__(self, shapes: Shapes, *, idle_s: float = 600.0, max_open: int = 100_000) -> None:
        self.shapes = shapes
        self._idle_s, self._max_open = idle_s, max_open
        self._open: OrderedDict[str, WorkflowRun] = OrderedDict()  # by their last arrivals
        self._silent: OrderedDict[str, WorkflowRun] = OrderedDict()  # no call in flight, by time
        self._admitted = 0
        self.on_end: Callable[[WorkflowRun], None] | None = None  # told of every ending
        self.on_move: Callable[[WorkflowRun], None] | None = None  # of those gone on elsewhere
        self._elsewhere: OrderedDict[str, WorkflowRun] = OrderedDict()
        self._changed: dict[str, set[str]] | None = None  # calls to tell of, by open workflow
        self._ended: deque[WorkflowPart] = deque(maxlen=_MAX_ENDED)  # and those left to others
        self._over: OrderedDict[str, float] = OrderedDict()  # when those ended that are over

    def __len__(self) -> int:
        return len(self._open)

    def get(self, workflow_id: str) -> WorkflowRun | None:
        """Return an open workflow."""
        return self._open.get(workflow_id)

    @property
    def elsewhere(self) -> Collection[str]:
        """Workflows that are open at other coordinators."""
        return self._elsewhere.keys()

    def inherited(self, call: Call) -> Call:
        """Return a call of a child session with what it has from the top of its tree.

        Its deadline is that of the root if a client asked for one. Where those above wait for it,
        it is a part of the root's workflow: what follows it is what follows there.
        """
        name = call.root
        root = None if name is None else self._open.get(name) or self._elsewhere.get(name)
        if root is None:
            return call
        waited_for = call.root == call.workflow_id
        if not root.asked:
            return replace(call, workflow_type=root.workflow_type) if waited_for else call
        if waited_for:
            return replace(
                call, workflow_type=root.workflow_type, deadline_s=NO_DEADLINE, stages_left=None
            )
        own_s = call.deadline_s if call.deadline_asked else NO_DEADLINE
        return replace(call, deadline_s=min(own_s, root.deadline_s), deadline_asked=True)

    def arrived(self, call: Call, now: float) -> tuple[WorkflowRun, SeenCall]:
        """Note that ``call`` arrived; opens its workflow when new."""
        run = self._open.get(call.workflow_id) or self._taken_over(call.workflow_id)
        if run is None:
            run = WorkflowRun(call.workflow_id, call.workflow_type, now)
            run.learned_as, run.lone = call.learned_as, call.final
            self._open[call.workflow_id] = run
        self._open.move_to_end(call.workflow_id)
        self._silent.pop(call.workflow_id, None)
        if call.deadline_s != NO_DEADLINE:
            run.deadline_s = call.deadline_s
            run.asked = run.asked or (call.deadline_asked and call.root is None)
        run.last_seen_s, run.turn, run.left = now, run.turn + 1, False
        run.in_flight += 1
        ordinal = run.stage_counts.get(call.stage, 0)
        run.stage_counts[call.stage] = ordinal + 1
        seen = SeenCall(call.stage, ordinal, call.arrived_s, call.prompt_tokens)
        if len(run.calls) < _MAX_CALLS:
            run.calls[call.call_id] = seen
        self._touch(run, call.call_id)
        return run, seen

    def placed(self, run: WorkflowRun, call: Call, engine_id: str) -> None:
        """Note where a call of a workflow went: its engine has the prompt then."""
        run.engine, run.prefix, run.chunk_tokens = engine_id, call.prefix, call.prefix_chunk_tokens
        self._touch(run, call.call_id)

    def admit(self, run: WorkflowRun, most: int) -> bool:
        """Return whether a workflow may go on, or begin among ``most`` others (0: no limit)."""
        if not run.admitted:
            if 0 < most <= self._admitted:
                return False
            run.admitted = True
            self._admitted += 1
        return True

    def ended(self, call: Call, result: CallResult, now: float) -> None:
        """Note that a call ended; without a full answer of known length it leaves no trace."""
        run = self._open.get(call.workflow_id)
        if run is None:
            return
        run.in_flight = max(run.in_flight - 1, 0)
        run.last_seen_s, run.failed = now, not result.ok
        run.final = run.final or call.final
        if result.ok and result.output_tokens is not None:
            seen = run.calls.get(call.call_id)
            at = None if seen is None else seen.ordinal
            self.shapes.learn_output(call.learned_as, call.stage, result.output_tokens, at)
            if seen is not None:
                seen.ended_s, seen.output_tokens = now, result.output_tokens
                prompt = result.prompt_tokens or seen.prompt_tokens
                seen.uncached_tokens = max(prompt - (result.cached_tokens or 0), 0)
                run.attained += seen.weight()
        else:
            run.calls.pop(call.call_id, None)
        self._touch(run, call.call_id)
        if run.in_flight:
            return
        if run.over or run.left:
            self._move(run)
        elif run.final:
            self.finished(call.workflow_id)
        else:
            self._silent[call.workflow_id] = run

    def finished(self, workflow_id: str) -> WorkflowRun | None:
        """End a workflow and learn from it; returns it, or ``None`` when it is not open."""
        if workflow_id not in self._open:
            self._taken_over(workflow_id)
        run = self._open.pop(workflow_id, None)
        self._silent.pop(workflow_id, None)
        if run is not None:
            self._admitted -= run.admitted
            if self._changed is not None:
                if not run.lone:
                    self._remember_over(workflow_id, run.last_seen_s)
                calls = set(run.calls) if run.lone else self._changed.pop(workflow_id, set())
                if calls or not run.lone:
                    self._ended.append(_part(run, calls, over=True))
            self.shapes.learn(run)
            if self.on_end is not None:
                self.on_end(run)
        return run

    def expire(self, now: float) -> list[WorkflowRun]:
        """End workflows that have been silent too long, or that are too many."""
        ended = []
        while self._open:
            run = next(iter((self._silent or self._open).values()))
            silent = bool(self._silent) and now - run.last_seen_s > self._idle_s
            if not silent and len(self._open) <= self._max_open:
                break
            if run.left and not run.in_flight:
                self._move(run)
                continue
            self.finished(run.workflow_id)
            ended.append(run)
        while self._elsewhere:
            workflow_id, run = next(iter(self._elsewhere.items()))
            if now - run.elsewhere_s <= self._idle_s and len(self._elsewhere) <= self._max_open:
                break
            del self._elsewhere[workflow_id]
        return ended

    # Several coordinators

    def share(self) -> None:
        """Keep from now on what others are to be told; of workflows that are open, all."""
        self._changed = {name: set(r.calls) for name, r in self._open.items() if not r.lone}

    def changes(self, most: int) -> list[WorkflowPart]:
        """Return what others have not been told yet, at most of so many workflows.

        Of workflows that ended the last few thousand are kept for telling. Nothing changes what
        was returned.
        """
        found: list[WorkflowPart] = []
        while self._ended and len(found) < most:
            found.append(self._ended.popleft())
        changed = self._changed
        while changed and len(found) < most:
            workflow_id = next(iter(changed))
            found.append(_part(self._open[workflow_id], changed.pop(workflow_id)))
        return found

    def heard(self, part: WorkflowPart, now: float) -> None:
        """Take in what another coordinator tells; ``now`` is when."""
        run = self._open.get(part.workflow_id)
        if run is not None and part.over and run.started_s > part.last_seen_s:
            run = None  # the name was used again
        known = run or self._elsewhere.get(part.workflow_id)
        late = known is None and part.started_s <= self._over.get(part.workflow_id, -math.inf)
        if known is None:
            known = WorkflowRun(part.workflow_id, part.workflow_type, part.started_s)
            known.learned_as = part.learned_as
        later = (part.turn, part.last_seen_s) > (known.turn, known.last_seen_s)
        self._merge(known, part)
        known.left = known.left or later
        known.elsewhere_s = max(known.elsewhere_s, min(part.last_seen_s, now))
        if part.over:
            known.over = True
            if not late:
                self.shapes.learn(known)
                self._remember_over(part.workflow_id, part.last_seen_s)
        if run is None and late:
            return  # its calls taught their lengths, and there is nothing to go on with
        if run is None:
            self._keep_elsewhere(known)
        elif run.in_flight == 0 and (run.over or run.left):
            self._move(run)

    def _remember_over(self, workflow_id: str, at_s: float) -> None:
        """Note an ending: messages that were under way then begin no workflow."""
        self._over[workflow_id] = max(at_s, self._over.pop(workflow_id, at_s))
        if len(self._over) > _MAX_ENDED:
            self._over.popitem(last=False)

    def _touch(self, run: WorkflowRun, call_id: str) -> None:
        if self._changed is not None and not run.lone:
            self._changed.setdefault(run.workflow_id, set()).add(call_id)

    def _taken_over(self, workflow_id: str) -> WorkflowRun | None:
        """Go on with a workflow that others know; ``None`` if they know none of that name."""
        run = self._elsewhere.pop(workflow_id, None)
        if run is not None:
            run.begun = run.admitted = True
            self._admitted += 1
            self._open[workflow_id] = run
        return run

    def _move(self, run: WorkflowRun) -> None:
        """Leave a workflow to others."""
        del self._open[run.workflow_id]
        self._silent.pop(run.workflow_id, None)
        changed = None if self._changed is None else self._changed.pop(run.workflow_id, None)
        if changed and not run.over:
            self._ended.append(_part(run, changed))  # what ended here, others need to know
        self._admitted -= run.admitted
        run.admitted = False
        self._keep_elsewhere(run)
        if self.on_move is not None:
            self.on_move(run)

    def _keep_elsewhere(self, run: WorkflowRun) -> None:
        self._elsewhere.pop(run.workflow_id, None)
        if not run.over:
            self._elsewhere[run.workflow_id] = run
            if len(self._elsewhere) > self._max_open:
                self._elsewhere.popitem(last=False)

    def _merge(self, run: WorkflowRun, part: WorkflowPart) -> None:
        run.started_s, run.turn = min(run.started_s, part.started_s), max(run.turn, part.turn)
        run.asked = run.asked or part.asked
        if part.asked_s > run.asked_s:
            run.asked_s, run.deadline_s = part.asked_s, part.deadline_s
            run.ordered_by_s = part.ordered_by_s
        elif part.asked_s == run.asked_s:
            run.deadline_s = min(run.deadline_s, part.deadline_s)
            run.ordered_by_s = min(run.ordered_by_s, part.ordered_by_s)
        if part.last_seen_s > run.last_seen_s and run.in_flight == 0:
            run.background, run.last_seen_s = part.background, part.last_seen_s
            if run.workflow_id in self._silent:
                self._silent.move_to_end(run.workflow_id)
        if part.engine:
            run.engine, run.prefix, run.chunk_tokens = part.engine, part.prefix, part.chunk_tokens
        for name, told in part.calls.items():
            seen = run.calls.get(name)
            if seen is None:
                if len(run.calls) >= _MAX_CALLS:
                    continue
                run.calls[name] = told
                run.stage_counts[told.stage] = run.stage_counts.get(told.stage, 0) + 1
            elif seen.ended_s is None and told.ended_s is not None:
                run.calls[name] = told
            else:
                continue
            if told.ended_s is not None:
                run.attained += told.weight()
                self.shapes.learn_output(
                    run.learned_as, told.stage, told.output_tokens, told.ordinal
                )
        for name in part.gone:
            run.calls.pop(name, None)


def _part(run: WorkflowRun, changed: set[str], *, over: bool = False) -> WorkflowPart:
    """Return what is to be told of a workflow; calls are copied, as they go on changing."""
    return WorkflowPart(
        run.workflow_id,
        run.workflow_type,
        run.learned_as,
        run.started_s,
        run.last_seen_s,
        run.turn,
        run.asked,
        run.asked_s,
        run.deadline_s,
        run.ordered_by_s,
        run.background,
        run.engine,
        run.prefix,
        run.chunk_tokens,
        {name: run.calls[name].copied() for name in changed if name in run.calls},
        tuple(name for name in changed if name not in run.calls),
        over,
    )
