"""Resuming and refusing: done stages, other settings, damaged checkpoints."""

import shutil
from pathlib import Path

import pytest

from distill.trainer import train_student
from teacher_cache.config import CacheConfig
from teacher_cache.errors import CheckpointError
from tests.distill.small_cache import build_small_cache, write_data
from tests.distill.small_runs import STAGE, continue_align, numbers, read_metrics, student_config, train_config


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2_vl: Path) -> CacheConfig:
    folder = tmp_path_factory.mktemp("checkpoint")
    data = write_data(folder / "data", num_samples=13, text_only=(3, 9), multi_turn=(2, 7))
    return build_small_cache(folder, teacher=tiny_qwen2_vl, data=data, without_question_rows=("s001", "s005"))


@pytest.fixture(scope="module")
def finished(cache: CacheConfig, tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("finished")
    train_student(
        cache=cache, student=student_config(tiny_llava), train=train_config(), output_dir=output_dir, stages=["align"]
    )
    return output_dir


def half_done(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of a run as a kill before the end of align leaves it: checkpoints of steps 1 and 2."""
    shutil.copytree(finished, tmp_path / "run")
    stage = tmp_path / "run" / "training" / "tiny" / "align"
    (stage / "DONE.json").unlink()
    shutil.rmtree(stage / "export")
    return tmp_path / "run"


def test_a_done_stage_is_skipped(cache: CacheConfig, tiny_llava: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    log = tmp_path / "run/training/tiny/align/metrics.jsonl"
    before = log.stat().st_mtime_ns
    continue_align(cache, tiny_llava, tmp_path / "run", save_interval_steps=7, log_interval_steps=3)
    assert log.stat().st_mtime_ns == before


def test_other_settings_are_refused_by_name(
    cache: CacheConfig, tiny_llava: Path, finished: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"settings\.learning_rate: stored 0\.001, asked 0\.002"):
        continue_align(cache, tiny_llava, finished, align=STAGE | {"learning_rate": 2e-3})
    with pytest.raises(CheckpointError, match="seed"):
        continue_align(cache, tiny_llava, half_done(finished, tmp_path), seed=1)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "record"])
def test_a_damaged_checkpoint_falls_back(
    damage: str, cache: CacheConfig, tiny_llava: Path, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = half_done(finished, tmp_path)
    newest = run / "training/tiny/align/checkpoints/step-00000002"
    state = newest / "state.pt"
    data = bytearray(state.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        state.write_bytes(data)
    elif damage == "truncate":
        state.write_bytes(data[:-7])
    elif damage == "delete":
        state.unlink()
    else:
        record = newest / "COMMIT.json"
        record.write_text(record.read_text().replace('"step"', '"stop"'))
    with caplog.at_level("INFO"):
        continue_align(cache, tiny_llava, run)
    assert "step-00000002 is damaged" in caplog.text
    assert "resumes after step 1" in caplog.text
    assert numbers(read_metrics(run, "align")) == numbers(read_metrics(finished, "align"))


def test_uncommitted_and_old_checkpoints(cache: CacheConfig, tiny_llava: Path, finished: Path, tmp_path: Path) -> None:
    run = half_done(finished, tmp_path)
    checkpoints = run / "training/tiny/align/checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000001", "step-00000002"]
    (checkpoints / "step-00000002" / "COMMIT.json").unlink()
    continue_align(cache, tiny_llava, run)
    assert numbers(read_metrics(run, "align")) == numbers(read_metrics(finished, "align"))
    assert (checkpoints / "step-00000002" / "COMMIT.json").exists()


def test_only_damaged_checkpoints_never_restart_silently(
    cache: CacheConfig, tiny_llava: Path, finished: Path, tmp_path: Path
) -> None:
    run = half_done(finished, tmp_path)
    for state in run.rglob("state.pt"):
        state.write_bytes(b"")
    with pytest.raises(CheckpointError, match="all 2 checkpoints"):
        continue_align(cache, tiny_llava, run)
