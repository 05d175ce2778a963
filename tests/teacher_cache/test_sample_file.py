import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from teacher_cache.config import DataConfig
from teacher_cache.errors import DataError
from teacher_cache.sample_file import SampleFile, scan_samples
from teacher_cache.samples import read_samples
from tests.teacher_cache.test_samples import png, row

ROWS: list[dict[str, Any]] = [
    row(f"s{number}", answer=f"answer {number} \u00fc", images=["g.png"]) for number in range(7)
]


@pytest.fixture(params=["parquet", "jsonl"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> DataConfig:
    """Seven good rows, in Parquet in groups of three, and a bad one among them."""
    (tmp_path / "g.png").write_bytes(png())
    rows = [*ROWS[:4], {**ROWS[4], "id": "bad", "images": ["nowhere.png"]}, *ROWS[4:]]
    path = tmp_path / f"data.{request.param}"
    if request.param == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    else:
        path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n\n" for one in rows), encoding="utf-8")
    return DataConfig(path=str(path), max_skipped_samples=1)


def test_a_scan_lists_what_a_read_gives(data: DataConfig) -> None:
    table, whole = scan_samples(data), read_samples(data)
    assert [(one.sample_id, one.digest) for one in table.samples] == [(s.sample_id, s.digest) for s in whole.samples]
    assert [(bad.sample_id, bad.reason) for bad in table.skipped] == [("bad", "missing-image")]
    assert table.skipped == whole.skipped


def test_samples_are_read_by_their_entries_in_any_order(data: DataConfig) -> None:
    table, whole = scan_samples(data), read_samples(data)
    order = [6, 0, 3, 2, 5, 2]
    with SampleFile(data) as file:
        assert file.read([table.samples[number] for number in order]) == [whole.samples[number] for number in order]


def test_data_that_changed_since_the_scan_is_refused(data: DataConfig, tmp_path: Path) -> None:
    table = scan_samples(data)
    (tmp_path / "g.png").write_bytes(png(shade=9))
    with SampleFile(data) as file, pytest.raises(DataError, match=r"s0 of digest .* has changed since the build began"):
        file.read(table.samples[:1])
    (tmp_path / "g.png").unlink()
    with SampleFile(data) as file, pytest.raises(DataError, match=r"has changed since the build began: .*g.png"):
        file.read(table.samples[:1])


def test_a_file_that_is_no_parquet_and_a_line_that_is_no_json_are_named(tmp_path: Path) -> None:
    (tmp_path / "g.png").write_bytes(png())
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as Parquet"):
        scan_samples(DataConfig(path=str(tmp_path / "a.parquet")))
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]) + "\n{not json\n[1]\n" + json.dumps(ROWS[1]))
    table = scan_samples(DataConfig(path=str(tmp_path / "a.jsonl"), max_skipped_samples=2))
    assert [sample.sample_id for sample in table.samples] == ["s0", "s1"]
    assert [bad.reason for bad in table.skipped] == ["bad-row", "bad-row"]
    assert "is no record but bytes: {not json" in table.skipped[0].message
