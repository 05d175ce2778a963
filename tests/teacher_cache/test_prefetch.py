import threading
from collections.abc import Iterator

import pytest

from teacher_cache.prefetch import Prefetch

WAIT_S = 10


def test_items_come_in_order_and_are_made_ahead() -> None:
    made = threading.Semaphore(0)

    def numbers() -> Iterator[int]:
        for number in range(6):
            made.release()
            yield number

    with Prefetch(numbers(), depth=3) as items:
        for _ in range(4):  # three wait and one is in hand before any was taken
            assert made.acquire(timeout=WAIT_S)
        assert not made.acquire(timeout=0.3), "it runs farther ahead than asked for"
        assert items.is_ready
        assert list(items) == list(range(6))
        assert items.is_ready, "the end can be met without waiting"
        assert next(items, None) is None


def test_what_the_iterable_raises_is_raised_in_its_place() -> None:
    def numbers() -> Iterator[int]:
        yield 1
        raise KeyError("broken")

    with Prefetch(numbers(), depth=4) as items:
        assert next(items) == 1
        with pytest.raises(KeyError, match="broken"):
            next(items)
        assert list(items) == []


def test_leaving_early_stops_the_thread_and_closes_the_generator() -> None:
    closed = threading.Event()

    def numbers() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    with Prefetch(numbers(), depth=2) as items:
        next(items)
    assert closed.is_set()
    assert threading.active_count() == len([thread for thread in threading.enumerate() if thread.name != "prefetch"])


def test_a_prefetch_that_feeds_another_may_be_left_first() -> None:
    release = threading.Event()

    def slow() -> Iterator[int]:
        yield 1
        release.wait(WAIT_S)

    inner = Prefetch(slow())
    with Prefetch(inner) as outer:
        assert next(outer) == 1
        release.set()
        inner.__exit__(None, None, None)
        assert list(outer) == []
