"""Copies are made where they pay, and the pool keeps those that are worth most."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen_vllm.policy.retention import (
    ASSUMED_BYTES_PER_S,
    CopyRates,
    Held,
    RecomputeRates,
    StoredCopy,
    choose_evictions,
    leaves_head,
    weigh,
    worth,
)

NOW = 1000.0
HELD = Held(tokens=4000, shared=0, token_bytes=128 * 1024)
PREFILL = RecomputeRates(token_s=1e-4)
MIB = 1 << 20
BUS = CopyRates(out_bytes_per_s=20e9, in_bytes_per_s=20e9)


def test_costs_are_those_of_the_formula() -> None:
    held = Held(tokens=1000, shared=200, token_bytes=1000)
    again = RecomputeRates(token_s=1e-3, context_s=1e-6, survival=0.25)
    found = weigh(held, again, CopyRates(1e6, 2e6))
    assert found.recompute_s == pytest.approx(600 * (1e-3 + 1e-6 * 700))
    assert found.copy_s == pytest.approx(0.8 + 0.3 + 4e-4)
    whole = weigh(held, again, CopyRates(1e6, 2e6), whole=True)
    assert whole.recompute_s == found.recompute_s
    assert whole.copy_s == pytest.approx(1.0 + 0.3 + 4e-4)


def test_the_shared_head_is_left_out_where_that_risks_less_than_it_saves() -> None:
    held = replace(HELD, shared=3000)  # 20 ms of copying against 400 ms of computing
    assert not leaves_head(held, replace(PREFILL, head_risk=0.1), BUS)
    assert leaves_head(held, replace(PREFILL, head_risk=0.04), BUS)
    beside = replace(BUS, beside=True, staging_bytes=1e9, pack_bytes_per_s=1e12)
    assert not leaves_head(held, replace(PREFILL, head_risk=0.04), beside)
    assert not leaves_head(HELD, replace(PREFILL, head_risk=0.0), BUS)


@pytest.mark.parametrize(
    ("held", "again", "copy", "keep", "expected"),
    [
        (HELD, PREFILL, BUS, "auto", (True, "faster")),
        (HELD, replace(PREFILL, token_s=1e-6), BUS, "auto", (False, "slower")),
        (HELD, replace(PREFILL, survival=1.0), BUS, "auto", (False, "slower")),
        (HELD, PREFILL, replace(BUS, in_bytes_per_s=1e8), "auto", (False, "slower")),
        (HELD, PREFILL, CopyRates(), "auto", (True, "faster")),
        (replace(HELD, shared=4000), PREFILL, BUS, "auto", (False, "nothing")),
        (replace(HELD, shared=4000), PREFILL, BUS, "always", (False, "nothing")),
        (replace(HELD, tokens=2), PREFILL, BUS, "auto", (False, "slower")),
        (HELD, replace(PREFILL, token_s=1e-6), BUS, "always", (True, "always")),
        (HELD, PREFILL, BUS, "never", (False, "never")),
    ],
)
def test_keeps_what_is_dearer_to_compute_than_to_copy(
    held: Held, again: RecomputeRates, copy: CopyRates, keep: str, expected: tuple[bool, str]
) -> None:
    found = weigh(held, again, copy, keep)
    assert (found.keep, found.reason) == expected
    assert found.redo_s == (found.copy_s if found.keep else found.recompute_s)


def test_a_tie_is_computed_again() -> None:
    copy_s = weigh(HELD, PREFILL, BUS).copy_s
    for factor, keep in ((1.19, False), (1.21, True)):
        again = RecomputeRates(token_s=factor * copy_s / HELD.tokens)
        assert weigh(HELD, again, BUS).keep is keep


def test_an_unknown_bandwidth_is_the_assumed_one() -> None:
    known = CopyRates(ASSUMED_BYTES_PER_S, ASSUMED_BYTES_PER_S)
    assert weigh(HELD, PREFILL, CopyRates()) == weigh(HELD, PREFILL, known)


def test_copies_beside_the_forward_pass_cost_less() -> None:
    beside = replace(BUS, beside=True, staging_bytes=64 << 20, pack_bytes_per_s=1e12)
    assert weigh(HELD, PREFILL, beside).copy_s < weigh(HELD, PREFILL, BUS).copy_s


@pytest.mark.parametrize(
    ("mib_out", "mib_in", "staging_mib", "held_s"),
    [
        (64, 0, 64, 64 * MIB / 1e12),  # all of it is packed into the staging
        (564, 0, 64, 500 * MIB / 20e9 + 564 * MIB / 1e12),  # what has no room waits for the bus
        (0, 16, 64, 16 * MIB / 20e9 + 16 * MIB / 1e12),  # short: waited for
        (0, 640, 64, 640 * MIB / 1e12),  # long: beside, but for its unpacking
        (100, 0, 0, 100 * MIB / 20e9 + 100 * MIB / 1e12),
    ],
)
def test_what_holds_the_forward_pass_up(
    mib_out: int, mib_in: int, staging_mib: int, held_s: float
) -> None:
    beside = replace(BUS, beside=True, staging_bytes=staging_mib * MIB, pack_bytes_per_s=1e12)
    assert beside.stall_s(mib_out * MIB, mib_in * MIB) == pytest.approx(held_s)


def test_worth_is_seconds_per_block_and_falls_with_slack() -> None:
    copy = StoredCopy(saves_s=1.0, blocks=10, latest_start_s=NOW)
    assert worth(copy, NOW) == pytest.approx(0.1)
    assert worth(replace(copy, latest_start_s=NOW - 99), NOW) == pytest.approx(0.1)
    assert worth(replace(copy, latest_start_s=NOW + 10), NOW) == pytest.approx(0.05)
    assert worth(replace(copy, blocks=20), NOW) == pytest.approx(0.05)
    assert worth(replace(copy, latest_start_s=math.inf), NOW) == pytest.approx(0.001)


def test_evicts_the_least_worth_and_no_more_than_needed() -> None:
    cheap = StoredCopy(saves_s=0.1, blocks=10, latest_start_s=NOW)
    small = StoredCopy(saves_s=0.3, blocks=5, latest_start_s=NOW)
    dear = StoredCopy(saves_s=5.0, blocks=10, latest_start_s=NOW)
    new = StoredCopy(saves_s=2.0, blocks=10, latest_start_s=NOW)
    stored = [dear, small, cheap]
    assert choose_evictions(stored, new, 4, NOW) == (2,)
    assert choose_evictions(stored, new, 12, NOW) == (2, 1)
    assert choose_evictions(stored, new, 16, NOW) is None
    assert choose_evictions(stored, new, 0, NOW) == ()
    assert choose_evictions([small, replace(cheap, blocks=1)], new, 5, NOW) == (0,)


def test_equals_do_not_evict_each_other() -> None:
    copy = StoredCopy(saves_s=1.0, blocks=10, latest_start_s=NOW)
    assert choose_evictions([copy], copy, 1, NOW) is None


copies = st.builds(
    StoredCopy,
    saves_s=st.floats(0, 10),
    blocks=st.integers(1, 50),
    latest_start_s=st.floats(NOW - 100, NOW + 100),
)


@given(st.lists(copies, max_size=8), copies, st.integers(0, 120))
def test_evictions_are_enough_needed_and_worth_less(
    stored: list[StoredCopy], new: StoredCopy, short: int
) -> None:
    found = choose_evictions(stored, new, short, NOW)
    lesser = [c for c in stored if worth(c, NOW) < worth(new, NOW)]
    if found is None:
        assert sum(c.blocks for c in lesser) < short
        return
    freed = [stored[i].blocks for i in found]
    assert sum(freed) >= short
    assert all(sum(freed) - blocks < short for blocks in freed)
    assert all(stored[i] in lesser for i in found)
