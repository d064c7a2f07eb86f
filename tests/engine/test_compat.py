"""Versions and seams are checked with one sentence that says what is wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hexgen_vllm.engine import compat
from hexgen_vllm.errors import UnsupportedVLLM

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    "version", ["0.28.0", "0.28.1", "0.30.0+cpu", "0.32.0", "0.33.0", "0.33.0.post1", "0.31.0rc2"]
)
def test_tested_versions_are_used_without_a_word(version: str) -> None:
    compat.require_supported(version)
    assert compat.doubt(version) is None


@pytest.mark.parametrize(
    "version",
    ["0.34.0", "0.34.0rc1", "1.0.0", "0.33.1.dev7+g1234", "0.1.dev1+gabc", "dev", "", "0.100.2"],
)
def test_untested_versions_are_tried_with_a_warning(version: str) -> None:
    compat.require_supported(version)
    said = compat.doubt(version)
    assert said is not None
    assert version in said
    assert "0.28 to 0.33" in said


@pytest.mark.parametrize("version", ["0.27.1", "0.9.2", "0.3", "0.27.2.dev3+gabc"])
def test_older_versions_are_refused_in_one_sentence(version: str) -> None:
    with pytest.raises(UnsupportedVLLM) as error:
        compat.require_supported(version)
    assert str(error.value) == (
        f"hexgen_vllm supports vLLM 0.28 to 0.33, but vLLM {version} is installed."
    )


def test_the_installed_vllm_has_every_seam() -> None:
    compat.require_supported(compat.found_version())
    compat.check_seams()


class Changed:
    """A scheduler whose ``schedule`` lost its parameter."""

    def schedule(self) -> None: ...


@pytest.mark.parametrize(
    ("seam", "named"),
    [
        (compat.Seam(Changed, "schedule", ("self", "throttle_prefills")), "Changed.schedule(self"),
        (compat.Seam(Changed, "gone", ("self",)), "Changed.gone"),
    ],
)
def test_a_changed_seam_is_named(seam: compat.Seam, named: str) -> None:
    with pytest.raises(UnsupportedVLLM, match=r"supported is vLLM 0\.28 to 0\.33") as error:
        compat.check_seams([seam])
    assert named in str(error.value)
    assert compat.found_version() in str(error.value)


def test_a_missing_attribute_is_named() -> None:
    with pytest.raises(UnsupportedVLLM, match="scheduler attribute waiting"):
        compat.check_instance(SimpleNamespace())


@pytest.mark.parametrize("name", ["num_tokens", "is_prefill_chunk", "skip_reading_prefix_cache"])
def test_a_request_that_lost_an_attribute_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    class Without(compat.Request):
        def __getattribute__(self, asked: str) -> Any:
            if asked == name:
                raise AttributeError(asked)
            return super().__getattribute__(asked)

    monkeypatch.setattr(compat, "_ATTRIBUTES", ())
    monkeypatch.setattr(compat, "Request", Without)
    scheduler = SimpleNamespace(**{compat.SECOND_QUEUE: ()})
    with pytest.raises(UnsupportedVLLM, match=rf"\b{name}\b"):
        compat.check_instance(scheduler)


def test_a_status_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "_NAMES", ((compat.RequestStatus, ("GONE",)),))
    with pytest.raises(UnsupportedVLLM, match=r"\bGONE\b"):
        compat.check_seams()


class Head:
    """A queue with one request."""

    def __init__(self, key_s: float, computed: int = 0, rank: int = 0) -> None:
        status = compat.RequestStatus.WAITING
        self.head = SimpleNamespace(
            hexgen=SimpleNamespace(rank=rank, key_s=key_s),
            num_computed_tokens=computed,
            status=status,
            num_stale_output_tokens=0,
            drop_stale_output=False,
        )

    def peek_request(self) -> Any:
        return self.head

    def first(self, most: int) -> list[Any]:
        return [self.head][:most]


def test_of_two_queues_holders_of_kv_go_first_then_the_more_urgent() -> None:
    queues = compat.TwoQueues()

    def chosen(waiting: Head | list[Any], skipped: Head | list[Any]) -> Any:
        queues.waiting, queues.skipped_waiting = waiting, skipped
        return queues._select_waiting_queue_for_scheduling()

    near, far, holder = Head(1.0), Head(2.0), Head(3.0, computed=16)
    assert chosen(near, far) is near
    assert chosen(far, near) is near
    assert chosen(near, holder) is holder
    assert chosen(near, Head(9.0, rank=-1)).head.hexgen.rank == -1
    assert chosen(near, []) is near
    assert chosen([], far) is far
    assert chosen([], []) is None


def test_nobody_is_next_while_a_holder_of_kv_can_start() -> None:
    def first(waiting: Any, second: Any) -> Any:
        queues = {"waiting": waiting, compat.SECOND_QUEUE: second}
        return compat.first_waiting(SimpleNamespace(**queues), 8)

    near, far, holder = Head(1.0), Head(2.0), Head(3.0, computed=16)
    assert first(near, []) == [near.head]
    assert first(near, holder) == []
    holder.head.status = compat.RequestStatus.WAITING_FOR_STREAMING_REQ
    assert first(near, holder) == [near.head]
    assert first(far, near) == [near.head, far.head]
    assert first(near, far) == [near.head, far.head]
    important = Head(9.0, rank=-1)
    assert first(near, important) == [important.head, near.head]
    assert first([], far) == [far.head]
    assert first([], []) == []


@pytest.mark.parametrize(
    ("interval", "executed", "last", "bound", "held"),
    [
        (1, 5, 0, False, False),
        (4, 5, 4, False, True),
        (4, 8, 4, False, False),
        (4, 5, 4, True, False),
    ],
)
def test_a_prefill_cadence_holds_admission(
    interval: int, executed: int, last: int, bound: bool, held: bool
) -> None:
    scheduler = SimpleNamespace(
        local_prefill_interval=interval,
        num_executed_steps=executed,
        last_prefill_step=last,
        prefill_capacity_bound=bound,
        running=[SimpleNamespace(is_prefill_chunk=False)],
    )
    assert compat.prefills_are_held(scheduler) == held
