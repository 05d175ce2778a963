"""Bad samples of a stage: counted once, limited, listed, and the same after a resume."""

import json
from pathlib import Path

import pytest

from distill.skipped import SkippedSamples
from teacher_cache.errors import DataError
from teacher_cache.schema import SkippedSample


def bad(name: str) -> SkippedSample:
    return SkippedSample(sample_id=name, reason="too-long", message=f"{name} is long")


def listed(path: Path) -> list[tuple[int, str]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(record["reason"] == "too-long" and record["message"] for record in records)
    return [(record["global_step"], record["sample_id"]) for record in records]


def test_a_sample_counts_once_in_all_epochs_and_on_all_processes(tmp_path: Path) -> None:
    path = tmp_path / "stage" / "skipped.jsonl"
    skipped = SkippedSamples(path, allowed=3, start_step=0, writes=True)
    skipped.add([bad("b"), bad("a"), bad("b")], step=1)
    skipped.add([], step=2)
    skipped.add([bad("a"), bad("c")], step=3)
    assert len(skipped) == 3
    assert listed(path) == [(1, "a"), (1, "b"), (3, "c")]


def test_a_resume_drops_what_is_taken_again(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    first = SkippedSamples(path, allowed=3, start_step=0, writes=True)
    first.add([bad("a")], step=1)
    first.add([bad("b")], step=4)
    with path.open("a") as file:
        file.write('{"global_step": 5, "sam')  # a killed run
    other = SkippedSamples(path, allowed=3, start_step=2, writes=False)
    assert len(listed_raw(path)) == 3
    again = SkippedSamples(path, allowed=3, start_step=2, writes=True)
    assert len(again) == len(other) == 1
    assert listed(path) == [(1, "a")]
    again.add([bad("b"), bad("a")], step=4)
    assert listed(path) == [(1, "a"), (4, "b")]


def listed_raw(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_one_more_than_allowed_stops_and_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    skipped = SkippedSamples(path, allowed=1, start_step=0, writes=True)
    skipped.add([bad("a")], step=1)
    with pytest.raises(DataError, match=r"2 bad samples .* allows 1; the last is b: b is long"):
        skipped.add([bad("b")], step=2)
    assert listed(path) == [(1, "a"), (2, "b")]
