"""Samples that are read ahead: which, how far, after a passing error, and what becomes of the thread."""

import threading
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from teacher_cache import samples_ahead
from teacher_cache.errors import DataError
from teacher_cache.samples_ahead import READ_ATTEMPTS, SamplesAhead, read_patiently

WAIT_S = 60


class Source:
    """Reads a shard as a list with its name; the first readings of some fail."""

    def __init__(self, *, failures: dict[str, int] | None = None) -> None:
        self.failures = failures or {}
        self.read_shards: list[str] = []
        self.was_read = threading.Condition()

    def read(self, shard: Any) -> list[Any]:
        with self.was_read:
            self.read_shards.append(shard.shard_id)
            self.was_read.notify_all()
        if self.failures.get(shard.shard_id, 0) > 0:
            self.failures[shard.shard_id] -= 1
            raise DataError(f"an image of {shard.shard_id}: Input/output error")
        return [shard.shard_id]

    def wait_for(self, *names: str) -> None:
        with self.was_read:
            assert self.was_read.wait_for(lambda: self.read_shards == list(names), timeout=WAIT_S), self.read_shards


def shards(names: str) -> deque[Any]:
    return deque(SimpleNamespace(shard_id=name) for name in names)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("samples-ahead")]


def test_one_shard_is_read_ahead_and_read_once() -> None:
    source, waiting = Source(), shards("abcd")
    with SamplesAhead(source.read, upcoming=lambda: waiting[0] if waiting else None) as ahead:
        assert ahead.take(waiting.popleft()) == ["a"]
        source.wait_for("a", "b")
        assert [ahead.take(waiting.popleft()) for _ in range(3)] == [["b"], ["c"], ["d"]]
        assert source.read_shards == ["a", "b", "c", "d"]
        assert threads()
    assert not threads()


def test_a_wrong_guess_costs_no_more_than_its_reading() -> None:
    source, waiting = Source(), shards("abc")
    with SamplesAhead(source.read, upcoming=lambda: waiting[0] if waiting else None) as ahead:
        assert ahead.take(waiting.popleft()) == ["a"]
        source.wait_for("a", "b")
        other = waiting.pop()
        assert ahead.take(other) == ["c"]
        assert ahead.take(waiting.popleft()) == ["b"]


def test_a_passing_error_is_read_over_and_a_lasting_one_raised_where_the_shard_is_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(samples_ahead, "READ_PAUSE_S", 0.0)
    source, waiting = Source(failures={"b": READ_ATTEMPTS - 1, "c": READ_ATTEMPTS}), shards("abc")
    with SamplesAhead(source.read, upcoming=lambda: waiting[0] if waiting else None) as ahead:
        assert ahead.take(waiting.popleft()) == ["a"]
        assert ahead.take(waiting.popleft()) == ["b"]
        assert "shard b: attempt 2 of 3 to read its samples failed: an image of b: Input/output" in caplog.text
        with pytest.raises(DataError, match="an image of c"):
            ahead.take(waiting.popleft())
    assert source.read_shards == ["a", *"b" * READ_ATTEMPTS, *"c" * READ_ATTEMPTS]


def test_the_end_of_the_pool_waits_for_no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_ahead, "READ_PAUSE_S", 10.0 * WAIT_S)
    source, waiting = Source(failures={"b": 9}), shards("ab")
    with SamplesAhead(source.read, upcoming=lambda: waiting[0]) as ahead:
        ahead.take(waiting.popleft())
        source.wait_for("a", "b")
    assert not threads()


def test_other_errors_are_raised_at_once() -> None:
    calls = []

    def read() -> None:
        calls.append(1)
        raise KeyError("id")

    with pytest.raises(KeyError):
        read_patiently(read, what="shard a")
    assert len(calls) == 1
