"""What mutation tests print and when they fail."""

from __future__ import annotations

import pytest

from tools.mutate import ROOT, SURVIVORS, Change, accepted, change_of, is_harmless, prepare, report

DIFF = """--- hexgen_vllm/policy/urgency.py
+++ hexgen_vllm/policy/urgency.py
@@ -1,3 +1,3 @@
 def first():
-    return a + b
+    return a - b
"""
ENTRY = """[[survivor]]
module = "urgency"
function = "UrgencyHeap.first"
before = "return a + b"
after = "return a - b"
reason = "b is 0"
"""
CHANGE = Change("urgency", "UrgencyHeap.first", "return a + b", "return a - b")
METHOD = "hexgen_vllm.policy.urgency.xǁUrgencyHeapǁfirst__mutmut_7"
FUNCTION = "hexgen_vllm.policy.order.x__put__mutmut_12"


def test_a_change_is_told_by_what_it_changes() -> None:
    assert change_of(METHOD, DIFF) == CHANGE
    assert change_of(FUNCTION, DIFF) == Change("order", "_put", "return a + b", "return a - b")


def test_accepted_survivors_have_reasons() -> None:
    assert accepted(ENTRY) == {CHANGE: "b is 0"}
    assert accepted("") == {}
    for bad in (ENTRY.replace("b is 0", " "), ENTRY.replace("after", "then"), 2 * ENTRY):
        with pytest.raises(ValueError, match=r"reason|after|twice"):
            accepted(bad)
    assert accepted(SURVIVORS.read_text(encoding="utf-8"))


def plain(code: str) -> str:
    return "".join(code.split()).replace(",)", ")").rstrip(",")


def test_accepted_survivors_are_of_the_code_as_it_is() -> None:
    for change in accepted(SURVIVORS.read_text(encoding="utf-8")):
        code = (ROOT / f"hexgen_vllm/policy/{change.module}.py").read_text(encoding="utf-8")
        assert plain(change.before) in plain(code), change


@pytest.mark.parametrize(
    ("survived", "known", "good"),
    [(0, False, True), (1, False, True), (2, False, False), (1, True, True), (0, True, False)],
)
def test_nine_in_ten_must_be_killed(survived: int, known: bool, good: bool) -> None:
    results: dict[str, int | None] = {f"hexgen_vllm.policy.urgency.x_f__mutmut_{i}": 1
                                      for i in range(10)}  # fmt: skip
    survivors = {}
    for i, name in enumerate(list(results)[:survived]):
        results[name] = 0
        survivors[name] = Change("urgency", "UrgencyHeap.first", "return a + b",
                                 "return a - b" if not i else f"return {i}")  # fmt: skip
    text, found = report(results, survivors, {CHANGE: "b is 0"} if known else {})
    assert found is good
    assert ("return a - b" in text) is (known != bool(survived))


def test_accepted_ones_do_not_count() -> None:
    results: dict[str, int | None] = {METHOD: 0, "hexgen_vllm.policy.urgency.x_f__mutmut_1": 1}
    assert report(results, {METHOD: CHANGE}, {})[1] is False
    assert report(results, {METHOD: CHANGE}, {CHANGE: "b is 0"})[1] is True


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(SystemExit, match="nonsense"):
        prepare(["nonsense"])


@pytest.mark.parametrize(
    ("before", "after", "harmless"),
    [
        ("for a, b in zip(x, y, strict=True):", "for a, b in zip(x, y, ):", True),
        ("for a, b in zip(x, y, strict=True):", "for a, b in zip(x, y, strict=False):", True),
        ("for a, b in zip(x, y, strict=True):", "for a, b in zip(x, y, strict=None):", True),
        ("for a, b in zip(x, y, strict=True):", "for a, b in zip(x, None, strict=True):", False),
        ("for a, b in zip(x, y, strict=True):", "for a, b in zip(x, strict=True):", False),
        ("n = f(x, 1)", "n = f(x, )", False),
        ('raise ValueError("no list")', 'raise ValueError("XXno listXX")', True),
        ('raise ValueError(f"no {x!r}")', 'raise ValueError(f"NO {X!R}")', True),
        ('raise ValueError("no list")', "raise ValueError(None)", False),
        ('raise ValueError("no list")', 'raise TypeError("no list")', False),
        ('return "due"', 'return "XXdueXX"', False),
        ("", "", False),
    ],
)
def test_some_changes_need_no_reason(before: str, after: str, harmless: bool) -> None:
    assert is_harmless(Change("dispatch", "costs", before, after)) is harmless
