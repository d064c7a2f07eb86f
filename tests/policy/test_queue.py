"""Held calls against a list that is sorted anew each time, and the rules of shares and turns."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest

from hexgen_vllm.policy.overload import FairShares
from hexgen_vllm.policy.queue import HeldCalls


@dataclass
class Held:
    """A held call as the reference has it."""

    name: str
    rank: int
    key: float
    number: int
    tokens: tuple[int, int]
    since_s: float
    model: str
    background: bool

    @property
    def order(self) -> tuple[bool, int, float, int]:
        return self.background, self.rank, self.key, self.number


@pytest.mark.parametrize("seed", range(12))
def test_held_calls_are_those_of_a_sorted_list(seed: int) -> None:
    rng, held = random.Random(seed), HeldCalls(0.0)
    known: dict[str, Held] = {}
    demoted: list[str] = []
    for number in range(120):
        now, act = float(number), rng.random()
        if act < 0.5 or not known:
            name = f"{rng.randrange(1000)}-{number}"  # the order of names is not that of arrival
            one = Held(
                name,
                0 if (background := rng.random() < 0.2) else -rng.randrange(-1, 2),
                float(rng.randrange(4)),
                number,
                (rng.randrange(9), rng.randrange(9)),
                now,
                rng.choice("ab"),
                background,
            )
            held.add(
                name,
                one.key,
                now,
                tenant=rng.choice("xyz"),
                tokens=one.tokens,
                priority=0 if background else -one.rank,
                background=background,
                model=one.model,
            )
            known[name] = one
            demoted += [name] if background else []
        elif act < 0.7:
            name = rng.choice(list(known))
            held.demote(name, work_s := float(rng.randrange(4)))
            if name not in demoted:
                one = known[name]
                one.background, one.rank, one.key = True, 0, work_s
                demoted.append(name)
        else:
            name = rng.choice(list(known))
            (held.remove if act < 0.8 else held.discard if act < 0.9 else held.placed)(name)
            del known[name]
            demoted = [one for one in demoted if one != name]
        assert_alike(held, known, now)
    held.discard("nobody")
    assert len(held) == len(known)


def assert_alike(held: HeldCalls, known: dict[str, Held], now: float) -> None:
    order = sorted(known.values(), key=lambda one: one.order)
    assert held.first(1000) == [one.name for one in order]
    assert held.first(3) == [one.name for one in order[:3]]
    for models in ({"a"}, {"b"}, {"a", "b"}, set()):
        assert held.first(1000, models) == [one.name for one in order if one.model in models]
    assert list(held.last_first()) == [
        one.name for one in sorted(order, key=lambda one: (not one.background, [
            -x for x in one.order[1:]]))
    ]  # fmt: skip
    assert held.tokens == sum(sum(one.tokens) for one in order)
    assert held.output_tokens == sum(one.tokens[1] for one in order if not one.background)
    by_model = {model: sum(one.model == model for one in order) for model in "ab"}
    assert held.models == {model: n for model, n in by_model.items() if n}
    for seconds in (0.0, 5.0, 50.0):
        wanted = [one.name for one in known.values() if now - one.since_s > seconds]
        assert held.waited_longer(seconds, now) == wanted
    assert len(held) == len(known)
    assert all(name in held for name in known)


def test_what_is_not_said_of_a_call_is_the_least_there_is() -> None:
    held = HeldCalls(0.0, FairShares(10, {}))
    for name, own_s in (("b", 0.0), ("c", 0.0)):
        held.add(
            name,
            5.0,
            0.0,
            tenant="",
            tokens=(0, 0),
            priority=0,
            background=False,
            model="",
            own_s=own_s,
        )
    held.add("unsaid", 5.0, 0.0)
    held.add("d", 5.0, 0.0, tenant="", priority=0)
    assert held.first(9, {""}) == ["b", "c", "unsaid", "d"]
    assert (held.tokens, held.output_tokens, held.models) == (0, 0, {"": 4})
    held.add("other", 9.0, 0.0, tenant="other")
    served(held, "", 1000)
    assert held.first(9)[0] == "other", "all the others are of the same tenant"


def test_unsaid_moments_and_lengths_are_no_danger() -> None:
    held = HeldCalls(0.0, FairShares(None, {}))
    held.add("b", 1.0, 0.0, tenant="b")
    served(held, "a", 1, calls=1000)
    held.add("a1", 0.1, 0.0, tenant="a")
    assert held.first(2) == held.first(2, now=0.0) == ["a1", "b"]
    assert held.first(2, now=0.5) == ["b", "a1"]


def test_demoted_calls_have_no_turn_unless_they_are_given_a_share() -> None:
    held = HeldCalls()
    held.add("demoted", 0.0, 0.0, background=True)
    for i in range(40):
        held.add(f"c{i}", 1.0, 0.0)
        assert held.first(1) == [f"c{i}"]
        held.placed(f"c{i}")


def test_the_call_demoted_longest_has_its_turn() -> None:
    held = HeldCalls(0.5)
    for name, work_s in (("old", 9.0), ("new", 1.0)):
        held.add(name, work_s, 0.0, background=True, model=name)
    held.add("a", 1.0, 0.0, model="m")
    held.add("b", 2.0, 0.0, model="m")
    held.add("c", 3.0, 0.0, model="m")
    for name in ("a", "b"):
        assert held.first(9) == [*"abc"["abc".index(name) :], "new", "old"]
        held.placed(name)
    assert held.first(9) == ["old", "c", "new"]
    assert [held.first(n) for n in (1, 2)] == [["old"], ["old", "c"]]
    assert held.first(9, {"m", "new"}) == ["new", "c"], "of those that can be served"
    assert held.first(9, {"m"}) == ["c"]
    held.placed("c")
    assert held.first(9) == ["old", "new"], "its turn is not over before it had it"
    held.placed("old")
    held.add("d", 4.0, 0.0)
    assert held.first(9) == ["d", "new"]


def test_a_turn_that_was_taken_is_over_while_the_oldest_waits_for_a_full_model() -> None:
    held = HeldCalls(0.5)
    held.add("oldest", 9.0, 0.0, background=True, model="full")
    for name in ("new", "newer"):
        held.add(name, 1.0, 0.0, background=True, model="m")
    for name in "abcd":
        held.add(name, 1.0, 0.0, model="m")
    found = []
    for _ in range(5):
        found.append(held.first(1, {"m"})[0])
        held.placed(found[-1])
    assert found == ["a", "b", "new", "c", "d"]


def test_demoted_calls_that_are_served_for_want_of_others_are_no_turn() -> None:
    held = HeldCalls(0.5)
    for i in range(3):
        held.add(f"b{i}", float(i), 0.0, background=True)
    held.placed("b0")
    held.placed("b1")
    held.add("fine", 1.0, 0.0)
    assert held.first(2) == ["b2", "fine"]


def served(held: HeldCalls, tenant: str, tokens: int, calls: int = 1) -> None:
    """Serve some calls of ``tenant``."""
    for _ in range(calls):
        held.add(f"first of {tenant}", 0.0, 0.0, tenant=tenant, tokens=(tokens, 0))
        held.placed(f"first of {tenant}")


def test_with_a_window_calls_of_tenants_ahead_come_last() -> None:
    held = HeldCalls(0.0, FairShares(10, {}))
    held.add("z1", 9.0, 0.0, tenant="z")
    served(held, "a", 100)
    for name, due_s in (("a1", 1.0), ("a2", 2.0), ("b1", 5.0), ("z0", 6.0)):
        held.add(name, due_s, 0.0, tenant=name[0])
    assert held.first(9) == ["b1", "z0", "z1", "a1", "a2"]
    held.demote("b1", 3.0)
    assert held.first(9) == ["z0", "z1", "a1", "a2", "b1"]


def endangered(now: float, **others: float) -> list[str]:
    """Return the order at ``now`` of calls of ``b``, while ``a`` is ahead and due at once."""
    held = HeldCalls(0.0, FairShares(None, {}))
    held.add("b-last", 1000.0, 0.0, tenant="b", tokens=(1, 0))
    served(held, "a", 1, calls=1000)
    held.add("a1", 1.0, 0.0, tenant="a", tokens=(1, 0))
    held.add("a2", 2.0, 0.0, tenant="a", tokens=(1, 0))
    for name, own_s in others.items():
        held.add(name, 100.0, 0.0, tenant="b", tokens=(1, 0), own_s=own_s)
    return held.first(200, now=now)


def test_without_a_window_only_calls_in_danger_come_before_those_of_tenants_ahead() -> None:
    assert endangered(0.0, b=1.0) == ["a1", "a2", "b", "b-last"]
    assert endangered(49.9, b=1.0) == ["a1", "a2", "b", "b-last"]
    assert endangered(50.0, b=1.0) == ["b", "a1", "a2", "b-last"], "half of its time is over"
    assert endangered(20.0, b=40.0) == ["b", "a1", "a2", "b-last"], "twice its own time is left"
    assert endangered(19.9, b=40.0)[0] == "a1"


def test_so_many_calls_are_looked_at_for_danger() -> None:
    calm = {f"b{i:02}": 0.0 for i in range(63)}
    assert endangered(20.0, **calm, in_danger=40.0)[0] == "in_danger"
    assert endangered(20.0, **calm, b63=0.0, in_danger=40.0)[0] == "a1"


def test_a_demoted_call_keeps_all_but_its_place() -> None:
    shares = FairShares(10, {})
    held = HeldCalls(0.0, shares)
    held.add("c", 5.0, 3.0, tenant="t", tokens=(70, 30), model="m", priority=4)
    held.demote("c", 1.0)
    assert (held.tokens, held.output_tokens, held.models) == (100, 0, {"m": 1})
    assert held.first(1, {"m"}) == ["c"]
    assert (held.waited_longer(1.9, 5.0), held.waited_longer(2.0, 5.0)) == (["c"], [])
    held.placed("c")
    assert (held.tokens, held.output_tokens, len(held)) == (0, 0, 0)
    assert shares.ahead(["t", "u"]) == {"t"}, "whose tokens they were"


def test_a_tenant_that_comes_starts_level_with_those_that_wait() -> None:
    held = HeldCalls(0.0, FairShares(10, {}))
    served(held, "a", 1000)
    held.add("a1", 1.0, 0.0, tenant="a")
    held.add("b1", 2.0, 0.0, tenant="b")
    assert held.first(2) == ["a1", "b1"], "absence earns no credit"
    served(held, "a", 1)
    assert held.first(2) == ["b1", "a1"]


@pytest.mark.parametrize(("tenants", "forgotten"), [(4096, False), (4097, True)])
def test_tenants_that_left_are_forgotten_once_very_many_wait(tenants: int, forgotten: bool) -> None:
    shares = FairShares(10, {})
    held = HeldCalls(0.0, shares)
    held.add("t", 1.0, 0.0, tenant="t")
    served(held, "gone", 1000)
    for i in range(tenants - 1):
        held.add(f"c{i}", 1.0, 0.0, tenant=f"t{i}")
    assert (shares.ahead(["t", "gone"]) == set()) is forgotten


def test_a_call_without_deadline_is_in_no_danger() -> None:
    held = HeldCalls(0.0, FairShares(None, {}))
    held.add("b", math.inf, 0.0, tenant="b", tokens=(1, 0), own_s=1e9)
    served(held, "a", 1, calls=1000)
    held.add("a1", 1e12, 0.0, tenant="a")
    assert held.first(2, now=1e9) == ["a1", "b"]
