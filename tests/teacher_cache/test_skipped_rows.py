import json
from pathlib import Path

import pytest

from teacher_cache import open_cache
from teacher_cache.build_plan import build_provenance
from teacher_cache.config import CacheConfig, DataConfig, TeacherConfig
from teacher_cache.errors import ConfigError
from teacher_cache.manifest import LIMIT_BYTES
from teacher_cache.schema import SkippedSample
from teacher_cache.skipped_rows import LISTED_BYTES, LISTED_ROWS, skipped_facts, write_skipped_rows
from tests.teacher_cache.store import make_samples, open_builder

CONFIG = CacheConfig(
    uri="runs/cache", teacher=TeacherConfig(model="teacher"), data=DataConfig(path="d.jsonl", max_skipped_samples=10**6)
)


def bad_rows(
    count: int, *, message: str = "image 'part/0.jpg' in /data: No such file or directory"
) -> list[SkippedSample]:
    reasons = ("missing-image", "bad-row", "missing-image")
    return [
        SkippedSample(sample_id=f"web-{number:09}", reason=reasons[number % 3], message=message)
        for number in range(count)
    ]


def test_a_cache_of_data_with_very_many_bad_rows_is_created(tmp_path: Path) -> None:
    skipped = bad_rows(15_000)
    write_skipped_rows(skipped, folder=tmp_path)
    provenance = build_provenance(CONFIG, skipped=skipped)
    open_builder(tmp_path / "cache", make_samples(1), provenance=provenance)
    told = open_cache(str(tmp_path / "cache"), allow_incomplete=True).provenance
    assert (tmp_path / "cache" / "CACHE.json").stat().st_size < LIMIT_BYTES / 8
    assert told["skipped_row_counts"] == {"bad-row": 5_000, "missing-image": 10_000}
    assert len(told["skipped_rows"]) + told["skipped_rows_not_listed"] == 15_000
    assert len(told["skipped_rows"]) == LISTED_ROWS
    lines = (tmp_path / told["skipped_rows_file"]).read_text().splitlines()
    assert len(lines) == 15_000
    assert [json.loads(line) for line in lines[:LISTED_ROWS]] == told["skipped_rows"]
    assert json.loads(lines[-1])["sample_id"] == "web-000014999"


def test_few_bad_rows_are_all_listed() -> None:
    assert skipped_facts(bad_rows(0)) == {"skipped_rows": [], "skipped_row_counts": {}}
    facts = skipped_facts(bad_rows(LISTED_ROWS))
    assert (len(facts["skipped_rows"]), sum(facts["skipped_row_counts"].values())) == (LISTED_ROWS, LISTED_ROWS)
    assert "skipped_rows_not_listed" not in facts


def test_long_messages_leave_rows_to_the_file() -> None:
    facts = skipped_facts(bad_rows(100, message="x" * (LISTED_BYTES // 4)))
    assert (len(facts["skipped_rows"]), facts["skipped_rows_not_listed"]) == (3, 97)


def test_a_list_is_written_once_and_other_rows_get_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_skipped_rows([], folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    write_skipped_rows(bad_rows(3), folder=tmp_path)
    (path,) = tmp_path.iterdir()
    assert f"3 bad row(s) of the data are left out (2 missing-image, 1 bad-row); all are listed in {path}" in (
        caplog.text
    )
    written = path.stat().st_mtime_ns
    write_skipped_rows(bad_rows(3), folder=tmp_path)
    assert path.stat().st_mtime_ns == written
    write_skipped_rows(bad_rows(4), folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_bad_row_whose_text_is_no_unicode_is_listed(tmp_path: Path) -> None:
    skipped = [SkippedSample(sample_id="\ud800", reason="bad-row", message="image '\udcff.png'")]
    write_skipped_rows(skipped, folder=tmp_path)
    open_builder(tmp_path / "cache", make_samples(1), provenance=build_provenance(CONFIG, skipped=skipped))
    (row,) = open_cache(str(tmp_path / "cache"), allow_incomplete=True).provenance["skipped_rows"]
    assert row == {"sample_id": "\\ud800", "reason": "bad-row", "message": "image '\\udcff.png'"}
    (path,) = tmp_path.glob("skipped-rows-*.jsonl")
    assert json.loads(path.read_text()) == row


def test_a_manifest_that_is_refused_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"would have \d+ bytes, at most \d+ are read; say less"):
        open_builder(tmp_path / "cache", make_samples(1), provenance={"text": "x" * LIMIT_BYTES})
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
