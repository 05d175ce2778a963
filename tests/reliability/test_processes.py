"""The tests' own processes: one that dies is a failure, and nobody waits for what it would have told."""

import os
import signal
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.reliability.processes import run_together, spread


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_ends_the_others() -> None:
    done = get_context("fork").Event()
    with pytest.raises(AssertionError, match="exit code -9"):
        run_together([die, done.wait], on_failure=done.set)


def test_what_a_process_raises_is_told() -> None:
    done = get_context("fork").Event()

    def fail() -> None:
        raise ValueError("by " * 100_000 + "design")

    with pytest.raises(AssertionError, match="by design"):
        run_together([fail, done.wait], on_failure=done.set)


def test_a_worker_that_dies_is_a_failure() -> None:
    with pytest.raises(AssertionError, match="exit code -9"):
        spread([1, 2], die)


def test_items_are_worked_on_each_in_a_folder_of_its_own() -> None:
    seen = get_context("fork").Array("i", 5)

    def work(item: int, place: Path) -> None:
        assert not any(place.iterdir())
        (place / "file").write_text("left")
        seen[item] += 1

    spread(range(5), work)
    assert list(seen) == [1] * 5
