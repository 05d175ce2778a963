"""Progress lines of a job that has no terminal."""

import itertools
import logging

import pytest

from teacher_cache.progress import progress


def test_a_job_without_a_terminal_logs_where_it_stands(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teacher_cache.progress.INTERVAL_S", 0.0)
    clock = itertools.count(step=5)  # each look at the clock finds it 5 s later
    monkeypatch.setattr("teacher_cache.progress.time.monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO), progress(total=4, unit="shard", description="cache build", initial=1) as bar:
        bar.update(1, tokens_per_s=12)
        bar.update(2)
    first, second, last = (record.message for record in caplog.records)
    assert first == "cache build: 2/4 shards, 0:10 elapsed, 0.1 shards/s, 0:20 left, tokens_per_s 12"
    assert second == "cache build: 4/4 shards, 0:20 elapsed, 0.15 shards/s"
    assert last.startswith("cache build: 4/4 shards")


def test_lines_come_once_per_interval(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), progress(total=100, unit="step", description="align") as bar:
        for _ in range(100):
            bar.update()
    (message,) = (record.message for record in caplog.records)
    assert message.startswith("align: 100/100 steps, 0:00 elapsed, ")
