"""vLLM's queue interface over the urgency heap."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hexgen_vllm.engine.request_queue import UrgencyQueue

pytestmark = pytest.mark.engine


class Waiting:
    """A request as the queue sees it."""

    def __init__(self, name: str, key_s: float, arrived_s: float = 0.0) -> None:
        self.name = name
        self.hexgen = SimpleNamespace(
            rank=0,
            key_s=key_s,
            arrived_s=arrived_s,
            latest_start_s=key_s,
            queued_start_s=0.0,
        )


def queue_of(*requests: Any) -> UrgencyQueue:
    queue = UrgencyQueue()
    for request in requests:
        queue.add_request(request)
    return queue


def names(queue: UrgencyQueue) -> list[str]:
    return [request.name for request in queue]


def test_orders_by_key_then_arrival_then_insertion() -> None:
    rows = [("d", 2, 0), ("a", 1, 0), ("c", 1, 5), ("b", 1, 0)]
    queue = queue_of(*(Waiting(n, k, a) for n, k, a in rows))
    assert names(queue) == ["a", "b", "c", "d"]
    assert [queue.pop_request().name for _ in range(4)] == ["a", "b", "c", "d"]
    assert not queue


def test_pop_takes_what_peek_showed() -> None:
    queue = queue_of(Waiting("b", 2))
    assert queue.peek_request().name == "b"
    queue.add_request(Waiting("a", 1))
    assert queue.pop_request().name == "b"
    assert queue.pop_request().name == "a"


def test_a_pin_does_not_outlive_its_request() -> None:
    first, second = Waiting("a", 1), Waiting("b", 2)
    queue = queue_of(first, second)
    queue.peek_request()
    queue.remove_requests([first, Waiting("stranger", 0)])
    assert queue.pop_request() is second
    with pytest.raises(IndexError):
        queue.pop_request()
    with pytest.raises(IndexError):
        queue.peek_request()


def test_prepending_means_queueing_by_key() -> None:
    queue = queue_of(Waiting("b", 2))
    queue.prepend_request(Waiting("c", 3))
    queue.prepend_requests([Waiting("a", 1), Waiting("d", 4)])
    assert names(queue) == ["a", "b", "c", "d"]
    assert len(queue) == 4


def test_rekeying_moves_and_notes_the_new_start() -> None:
    first, second = Waiting("a", 1), Waiting("b", 2)
    queue = queue_of(first, second)
    first.hexgen.key_s = first.hexgen.latest_start_s = 3.0
    queue.rekey(first)
    assert names(queue) == ["b", "a"]
    assert first.hexgen.queued_start_s == 3.0
    queue.remove_request(first)
    queue.rekey(first)  # no longer in the queue: nothing to move
    assert names(queue) == ["b"]
    assert first not in queue
    with pytest.raises(KeyError):
        queue.remove_request(first)


@pytest.mark.parametrize(("ended", "left"), [(False, ["a", "b"]), (True, ["b"])])
def test_what_was_queued_twice_and_taken_out_is_queued_again(ended: bool, left: list[str]) -> None:
    first, second = Waiting("a", 1), Waiting("b", 2)
    first.is_finished = lambda: ended
    queue = queue_of(first, second, first)
    assert names(queue) == ["a", "b"]
    queue.remove_requests([first])
    queue.restore()
    queue.restore()
    assert names(queue) == left
