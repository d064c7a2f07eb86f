"""How likely KV is wanted again: learned per kind, said by clients, and less as time passes."""

from __future__ import annotations

import pytest

from hexgen_vllm.policy.retention import (
    CopyRates,
    RecomputeRates,
    ReturnSurvival,
    StoredCopy,
    choose_evictions,
    pays_to_keep,
    worth,
)
from hexgen_vllm.policy.returns import CallKind, End, Plans, Returns, WorkflowKv

TOOL = CallKind("agent", "tool")
ANSWER = CallKind("agent", "answer")
CHAT = CallKind("default", "default", lone=True)
NOW = 1000.0


def end(kind: CallKind, ended_s: float = NOW, **plans: object) -> End:
    return End(kind, ended_s, Plans(**plans), 640)  # type: ignore[arg-type]


def learned(*, think_s: float = 1.0, calls: int = 40) -> Returns:
    """``tool`` is followed after ``think_s``, ``answer`` never."""
    returns = Returns()
    for i in range(calls):
        at = 10.0 * i
        returns.ended(("tool", i), end(TOOL, at), at)
        assert returns.wanted([("other", i), ("tool", i)], at + think_s)
        returns.ended(("answer", i), end(ANSWER, at), at)
        returns.left([("answer", i)])
    return returns


def test_kinds_are_learned_apart() -> None:
    returns = learned()
    assert returns.chance(end(TOOL), NOW) > 0.9
    assert returns.chance(end(ANSWER), NOW) < 0.1


def test_a_new_stage_is_judged_by_its_type_and_a_new_type_is_even() -> None:
    returns = learned()
    assert 0.3 < returns.chance(end(CallKind("agent", "new")), NOW) < 0.7
    assert returns.chance(end(CallKind("new", "new")), NOW) == pytest.approx(0.5)


def test_lone_calls_are_kept_once_they_are_seen_to_come_back() -> None:
    returns = Returns()
    assert returns.chance(end(CHAT), NOW) == 0.0
    returns.ended("a", end(CHAT), NOW)
    returns.wanted(["a"], NOW + 3)
    assert 0.1 < returns.chance(end(CHAT), NOW) < 0.6


def test_the_chance_falls_once_the_usual_think_time_has_passed() -> None:
    returns = learned(think_s=2.0)
    found = [returns.chance(end(TOOL), NOW + waited) for waited in (0, 1, 3, 10, 1000)]
    assert found == sorted(found, reverse=True)
    assert found[1] > 0.9
    assert found[-1] < 0.2


def test_what_nobody_came_back_to_is_learned_too() -> None:
    returns = Returns()
    for i in range(30):
        returns.ended(i, end(TOOL, NOW), NOW)
    returns.ended("late", end(TOOL, NOW + 5000), NOW + 5000)
    assert returns.chance(end(TOOL), NOW) < 0.1


@pytest.mark.parametrize(
    ("plans", "waited_s", "least", "most"),
    [
        ({"follows": False}, 0, 0.0, 0.0),
        ({"follows": True}, 0, 1.0, 1.0),
        ({"follows": True}, 60, 0.5, 1.0),
        ({"resume_s": 30.0}, 50, 1.0, 1.0),
        ({"resume_s": 30.0}, 500, 0.0, 0.2),
        ({"keep_s": 300.0}, 299, 0.9, 1.0),
        ({"keep_s": 300.0}, 301, 0.0, 0.0),
    ],
)
def test_what_a_client_says_goes_first(
    plans: dict[str, object], waited_s: float, least: float, most: float
) -> None:
    assert least <= Returns().chance(end(ANSWER, **plans), NOW + waited_s) <= most


def test_memory_is_bounded() -> None:
    returns = Returns()
    for i in range(20_000):
        returns.ended(i, end(CallKind(f"type {i}", "s")), NOW)
    assert len(returns._ends) <= 8192
    assert len(returns._kinds) <= 1024
    assert len(returns._types) <= 1024


AGAIN = RecomputeRates(token_s=1e-4)
COPY = CopyRates(20e9, 20e9)


@pytest.mark.parametrize(
    ("chance", "survival", "keep", "kept"),
    [
        (0.5, 0.0, "auto", True),
        (0.05, 0.0, "auto", False),  # hardly ever wanted
        (0.9, 0.97, "auto", False),  # wanted, and found on the device
        (0.0, 0.0, "always", False),
        (0.05, 0.9, "always", True),
        (1.0, 0.0, "never", False),
    ],
)
def test_it_is_copied_if_what_it_saves_is_likely_to_be_wanted(
    chance: float, survival: float, keep: str, kept: bool
) -> None:
    again = RecomputeRates(AGAIN.token_s, survival=survival)
    assert pays_to_keep(1000, 1000, chance, again, COPY, 131072.0, keep) is kept


def test_it_gives_way_to_what_is_wanted_more_and_sooner() -> None:
    sure = StoredCopy(1.0, 10, NOW)
    half = StoredCopy(1.0, 10, NOW, chance=0.5)
    later = StoredCopy(1.0, 10, NOW + 30, chance=0.5)
    assert worth(sure, NOW) == 2 * worth(half, NOW) == 8 * worth(later, NOW)
    assert choose_evictions([sure, half, later], sure, 10, NOW) == (2,)


def test_kv_is_let_go_if_no_other_workflow_or_lone_call_used_it() -> None:
    kv = WorkflowKv(100)
    kv.used("abcd", "w")
    kv.used("abef", "w")
    kv.used("ax", "v")
    assert kv.over("w") == list("bcdef")
    kv.used("abc", None)
    assert kv.over("w") == list("def")
    kv.used("uv", None)
    kv.used("uv", "v")
    assert kv.over("v") == ["x"]
    assert kv.over("nobody") == []


def test_what_was_let_go_once_is_kept_when_the_next_workflow_comes_with_it() -> None:
    kv = WorkflowKv(100)
    for i in range(3):
        kv.used(["template", f"own {i}"], f"w{i}")
        assert kv.over(f"w{i}") == ([f"own {i}"] if i else ["template", "own 0"])


def test_what_is_remembered_of_kv_is_bounded() -> None:
    kv = WorkflowKv(10)
    for i in range(100):
        kv.used([(i, j) for j in range(4)], f"w{i}")
    assert kv.over("w99") == [(99, j) for j in range(4)]
    assert kv.over("w0") == []
    assert sum(len(kv.over(f"w{i}")) for i in range(100)) == 10


def test_what_survives_in_an_idle_engine_says_nothing_of_a_full_one() -> None:
    survival = ReturnSurvival()
    for _ in range(50):
        survival.observe(0.1, 1.0)
    assert survival.share(0.0) == survival.share(0.45) > 0.99
    assert [survival.share(usage) for usage in (0.6, 0.8, 0.95, 1.0)] == [0.0] * 4
    for _ in range(50):
        survival.observe(1.0, 0.3)
    assert survival.share(0.9) == pytest.approx(0.3, abs=0.01)
    assert survival.share(0.1) > 0.99
    assert 0.3 < survival.mean < 0.4
