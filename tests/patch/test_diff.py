"""A diff changes exactly what it was made for, or nothing."""

from __future__ import annotations

import difflib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen_vllm.patch import diff

TEXT = "".join(f"line {i}\n" for i in range(40))
CHANGED = TEXT.replace("line 5\n", "").replace("line 30\n", "line 30\nline 30 and a half\n")


def unified(old: str, new: str, name: str = "pkg/file.py") -> str:
    lines = difflib.unified_diff(
        old.splitlines(keepends=True), new.splitlines(keepends=True), f"a/{name}", f"b/{name}"
    )
    return "Why it is there.\n\n- a point\n+ another\n\n" + "".join(lines)


def test_it_applies_and_goes_again() -> None:
    found = diff.parse(unified(TEXT, CHANGED))
    assert found.keys() == {"pkg/file.py"}
    hunks = found["pkg/file.py"]
    assert len(hunks) == 2
    assert diff.apply(TEXT, hunks) == CHANGED
    assert diff.apply(CHANGED, diff.reverse(hunks)) == TEXT


def test_several_files() -> None:
    text = unified(TEXT, CHANGED) + unified(CHANGED, TEXT, "other.py")
    found = diff.parse(text)
    assert diff.apply(TEXT, found["pkg/file.py"]) == CHANGED
    assert diff.apply(CHANGED, found["other.py"]) == TEXT


def test_lines_may_have_moved() -> None:
    hunks = diff.parse(unified(TEXT, CHANGED))["pkg/file.py"]
    assert diff.apply("new\n" + TEXT, hunks) == "new\n" + CHANGED


@pytest.mark.parametrize(
    ("text", "places"),
    [(CHANGED, 0), (TEXT + TEXT, 2), (TEXT.replace("line 4\n", "line 4 \n"), 0), ("", 0)],
)
def test_what_it_was_not_made_for_is_refused(text: str, places: int) -> None:
    hunks = diff.parse(unified(TEXT, CHANGED))["pkg/file.py"]
    assert not diff.fits(text, hunks)
    with pytest.raises(diff.MismatchError, match=f"hunk 1 fits in {places} places, not in one"):
        diff.apply(text, hunks)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no diff at all\n", "changes nothing"),
        ("+++ b/x\n", "changes nothing"),
        ("+++ b/x\n@@ -1,2 +1 @@\n a\n", "'' is no line of a hunk"),
        ("+++ b/x\n@@ -1,2 +1 @@\n a\n\\ No newline\n", "is no line of a hunk"),
    ],
)
def test_what_is_no_diff_is_refused(text: str, says: str) -> None:
    with pytest.raises(diff.MismatchError, match=says):
        diff.parse(text)


lines = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=30).map(
    lambda letters: "".join(f"{i} {letter}\n" for i, letter in enumerate(letters))
)


@given(old=lines, new=lines)
def test_any_change_of_distinct_lines_comes_back(old: str, new: str) -> None:
    if old == new:
        return
    hunks = diff.parse(unified(old, new))["pkg/file.py"]
    assert diff.apply(old, hunks) == new
    assert diff.apply(new, diff.reverse(hunks)) == old
