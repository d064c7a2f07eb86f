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

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict, deque
from heapq import nlargest
from itertools import islice
from typing import Any, Final, Generic, Protocol, TypeVar

from hexgen_vllm.policy.calls import NOTHING, Tail, path_weight
from hexgen_vllm.policy.workflow import SeenCall, WorkflowRun
from hexgen_vllm.types import OF

_FEW: Final = 16  # up to so many new samples are put in their places one by one
_ENOUGH: Final = 8
_ORDINALS: Final = 8  # calls of a stage in a workflow whose lengths are learned one by one
_ENOUGH_LENGTHS: Final = 32
_MAX_KEYS: Final = 4096
_MOST_TOKENS: Final = 2**31 - 1  # what was written down may be broken
_MOST: Final = 1e12  # tokens or seconds of a path


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


_TailSample = tuple[float, float, float, float, float]
"""Weight of a path, by which it is ordered, and what it is made of."""


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
            sample = _sample(tail)
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
                return _path(stats.tails.quantile(q))
            thin = stats
        if thin is not None:
            return _path(thin.tails.quantile(q))
        return NOTHING

    def export(self, most_keys: int = 512, most_samples: int = 64) -> list[dict[str, Any]]:
        """Return the newest samples of the keys that have most, as plain JSON values."""
        keys = nlargest(most_keys, self._stats, key=lambda key: self._stats[key].samples)
        return [
            {
                "key": list(key),
                "outputs": stats.outputs.newest(most_samples),
                "tails": [list(sample[1:]) for sample in stats.tails.newest(most_samples)],
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
                stats.tails.add(_sample(tail))

    def known_stages(self) -> dict[str, dict[str, int]]:
        """Return, per workflow type and stage, the number of remembered output lengths."""
        known: dict[str, dict[str, int]] = {}
        for key, stats in self._stats.items():
            if len(key) == 2:  # (type, stage)
                known.setdefault(key[0], {})[key[1]] = len(stats.outputs)
        return known


def _sample(tail: Tail) -> _TailSample:
    weight = path_weight(tail)
    return weight, tail.calls, tail.prefill_tokens, tail.output_tokens, tail.think_s


def _path(sample: _TailSample) -> Tail:
    return Tail(sample[1], sample[2], sample[3], sample[4]) if sample[1] else NOTHING


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
    if not all(type(tokens) is int and 0 <= tokens <= _MOST_TOKENS for tokens in outputs):
        raise ValueError("not output lengths")
    return tuple(key), outputs, [_tail(path) for path in paths]


def _tail(path: object) -> Tail:
    if not isinstance(path, list) or not 3 <= len(path) <= 4:  # 3 without think time
        raise ValueError("not a path")
    for number in path:
        if type(number) not in (int, float) or not 0.0 <= number <= _MOST:
            raise ValueError("not a path")
    return Tail(*map(float, path))


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
