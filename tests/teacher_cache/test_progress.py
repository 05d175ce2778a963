"""Progress lines of a job that has no terminal."""

import logging

import pytest

from teacher_cache.progress import progress


def test_a_job_without_a_terminal_logs_where_it_stands(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teacher_cache.progress.INTERVAL_S", 0.0)
    with caplog.at_level(logging.INFO), progress(total=4, unit="shard", description="cache build", initial=1) as bar:
        bar.update(1, tokens_per_s=12)
        bar.update(2)
    first, second, last = (record.message for record in caplog.records)
    assert first.startswith("cache build: 2/4 shards, 0:00 elapsed, 0:00 left")
    assert first.endswith("tokens_per_s 12")
    assert second.startswith("cache build: 4/4 shards")
    assert "left" not in last


def test_lines_come_once_per_interval(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), progress(total=100, unit="step", description="align") as bar:
        for _ in range(100):
            bar.update()
    assert [record.message for record in caplog.records] == ["align: 100/100 steps, 0:00 elapsed"]
