"""Resuming and refusing: done stages, other settings, damaged checkpoints."""

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest

from distill import loop, trainer
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
    """Return a copy of a run as a kill during the export of align leaves it: checkpoints of steps 2 and 3."""
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
    newest = run / "training/tiny/align/checkpoints/step-00000003"
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
    assert "step-00000003 is damaged" in caplog.text
    assert "resumes after step 2" in caplog.text
    assert numbers(read_metrics(run, "align")) == numbers(read_metrics(finished, "align"))


def test_uncommitted_and_old_checkpoints(cache: CacheConfig, tiny_llava: Path, finished: Path, tmp_path: Path) -> None:
    run = half_done(finished, tmp_path)
    checkpoints = run / "training/tiny/align/checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000002", "step-00000003"]
    (checkpoints / "step-00000003" / "COMMIT.json").unlink()
    continue_align(cache, tiny_llava, run)
    assert numbers(read_metrics(run, "align")) == numbers(read_metrics(finished, "align"))
    assert (checkpoints / "step-00000003" / "COMMIT.json").exists()


def test_an_export_that_failed_is_done_again_without_a_step(
    cache: CacheConfig, tiny_llava: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    def no_step(*_: Any, **__: Any) -> None:
        raise AssertionError("a step was taken")

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "export_student", full)
        with pytest.raises(OSError, match="no space left"):
            continue_align(cache, tiny_llava, tmp_path, save_interval_steps=100)
    stages = [folder / "training/tiny/align" for folder in (tmp_path, finished)]
    assert not (stages[0] / "DONE.json").exists()
    for name in ("take_step", "RankBatches"):
        monkeypatch.setattr(loop, name, no_step)
    continue_align(cache, tiny_llava, tmp_path, save_interval_steps=100)
    assert (stages[0] / "DONE.json").exists()
    assert numbers(read_metrics(tmp_path, "align")) == numbers(read_metrics(finished, "align"))
    for name in ("recalibrator.safetensors", "export/model.safetensors", "features_last.safetensors"):
        assert (stages[0] / name).read_bytes() == (stages[1] / name).read_bytes(), name


def test_only_damaged_checkpoints_never_restart_silently(
    cache: CacheConfig, tiny_llava: Path, finished: Path, tmp_path: Path
) -> None:
    run = half_done(finished, tmp_path)
    for state in run.rglob("state.pt"):
        state.write_bytes(b"")
    with pytest.raises(CheckpointError, match="all 2 checkpoints"):
        continue_align(cache, tiny_llava, run)
