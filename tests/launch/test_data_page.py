"""docs/data.md: its rows are samples or are refused as it says, and it names every reason for which one is."""

import ast
import json
import re
import runpy
from pathlib import Path

import PIL.Image
import pytest

from teacher_cache.config import DataConfig
from teacher_cache.messages import ROLES
from teacher_cache.samples import COLUMNS, SampleSet, read_samples
from tests.launch.test_readme import ROOT, blocks

PAGE = (ROOT / "docs" / "data.md").read_text()
GOOD_ROWS, BAD_ROWS = blocks("jsonl", text=PAGE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the images that the page names."""
    (tmp_path / "images").mkdir()
    for number, name in enumerate(("cat", "dog")):
        PIL.Image.new("RGB", (8, 8), number).save(tmp_path / "images" / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(path: Path, *, allowed: int = 0) -> SampleSet:
    return read_samples(DataConfig(path=str(path), max_skipped_samples=allowed))


def lines(folder: Path, text: str) -> Path:
    path = folder / "data.jsonl"
    path.write_text(text)
    return path


def test_the_rows_are_samples(folder: Path) -> None:
    given = [json.loads(line) for line in GOOD_ROWS.splitlines()]
    samples = read(lines(folder, GOOD_ROWS)).samples
    assert [sample.sample_id for sample in samples] == [str(row.get("id", samples[2].digest[:32])) for row in given]
    assert [len(sample.images) for sample in samples] == [1, 2, 0, 0]
    assert {key for row in given for key in row} == set(COLUMNS)
    assert {message["role"] for row in given for message in row["messages"]} == set(ROLES)


def test_the_row_in_parquet_is_the_first_of_them(folder: Path) -> None:
    (code,) = blocks("python", text=PAGE)
    (folder / "write.py").write_text(code)
    runpy.run_path("write.py")
    assert read(folder / "data.parquet").samples == read(lines(folder, GOOD_ROWS)).samples[:1]


def test_the_bad_rows_are_left_out_for_the_reason_that_they_name(folder: Path) -> None:
    rows = BAD_ROWS.splitlines()
    skipped = read(lines(folder, GOOD_ROWS + BAD_ROWS), allowed=len(rows)).skipped
    assert len(skipped) == len(rows)
    for bad in skipped:
        assert bad.sample_id.startswith(bad.reason), bad


def reasons_in_code() -> set[str]:
    """The words that are given as the reason of a sample that cannot be used."""
    found = set()
    for package in ("teacher_cache", "distill", "launch"):
        for path in (ROOT / package).rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text())):
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("SampleError", "SkippedSample"):
                    given = next((word.value for word in call.keywords if word.arg == "reason"), None)
                    if isinstance(given, ast.Constant):
                        found.add(given.value)
    return found


def test_every_reason_is_explained() -> None:
    table = PAGE.partition("| reason |")[2]
    assert set(re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE)) == reasons_in_code()


def test_the_limits_are_those_of_the_code() -> None:
    assert f"{PIL.Image.MAX_IMAGE_PIXELS:,}, where Pillow" in PAGE
    assert f"`cache.data.max_length` ({DataConfig.model_fields['max_length'].default:,})" in PAGE
    assert f"`cache.data.max_skipped_samples` ({DataConfig.model_fields['max_skipped_samples'].default})" in PAGE
