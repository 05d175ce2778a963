"""What a run may change before it goes on, and what makes it another run: refused by name, with exit code 4."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.config import StageConfig, StudentConfig, TrainConfig
from distill.identity import FREE_OF_STAGE, FREE_OF_STUDENT, FREE_OF_TRAINING, PER_STAGE
from distill.trainer import train_student
from teacher_cache import TeacherCache
from teacher_cache.config import CacheConfig
from teacher_cache.errors import CheckpointError
from tests.distill.small_cache import build_small_cache, write_data
from tests.distill.small_runs import STAGE, numbers, read_metrics, student_config, train_config


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2_vl: Path) -> CacheConfig:
    folder = tmp_path_factory.mktemp("identity")
    data = write_data(folder / "data", num_samples=13, text_only=(3, 9))
    return build_small_cache(folder, teacher=tiny_qwen2_vl, data=data)


@pytest.fixture(scope="module")
def whole(cache: CacheConfig, tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("whole")
    train(cache, student_config(tiny_llava), folder)
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of the run as a kill before its end leaves it."""
    shutil.copytree(whole, tmp_path / "run")
    stage = tmp_path / "run/training/tiny/align"
    (stage / "DONE.json").unlink()
    shutil.rmtree(stage / "export")
    return tmp_path / "run"


def train(cache: CacheConfig, student: StudentConfig, output_dir: Path, **changes: Any) -> None:
    train_student(cache=cache, student=student, train=train_config(**changes), output_dir=output_dir, stages=["align"])


@pytest.mark.parametrize(
    "changes",
    [
        {"align": STAGE | {"micro_batch_size": 6}},
        {"align": STAGE | {"micro_batch_tokens": 100}},
        {"data_workers": 1},
        {"gradient_checkpointing": True, "log_interval_steps": 1, "keep_checkpoints": 3, "encoding_cache_mib": 0},
        {"faults": {"spike_factor": 50}, "hang_timeout_s": 77, "save_interval_steps": 5},
    ],
    ids=["micro-batch", "tokens", "workers", "memory", "limits"],
)
def test_layout_intervals_and_limits_may_change(
    changes: dict[str, Any], cache: CacheConfig, tiny_llava: Path, run: Path, whole: Path
) -> None:
    train(cache, student_config(tiny_llava), run, **changes)
    left, right = (numbers(read_metrics(folder, "align"))[-1] for folder in (run, whole))
    names = ("global_step", "train/loss", "optim/grad_norm", "optim/lr")
    assert [left[name] for name in names] == pytest.approx([right[name] for name in names], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"align": STAGE | {"global_batch_size": 3}}, r"settings\.global_batch_size: stored 6, asked 3"),
        ({"align": STAGE | {"max_steps": 4}}, r"settings\.max_steps: stored 3, asked 4"),
        ({"align": STAGE | {"adam_betas": (0.9, 0.99)}}, r"settings\.adam_betas"),
        ({"align": STAGE | {"max_samples": 12}}, r"settings\.max_samples"),
        ({"recalibrator": {"num_blocks": 1}}, r"recalibrator\.num_blocks: stored 2, asked 1"),
        ({"seed": 7}, "seed: stored 0, asked 7"),
    ],
)
def test_other_settings_are_another_run(
    changes: dict[str, Any], message: str, cache: CacheConfig, tiny_llava: Path, run: Path
) -> None:
    refused(lambda: train(cache, student_config(tiny_llava), run, **changes), message)


def test_another_student_is_another_run(
    cache: CacheConfig, tiny_llava: Path, tiny_internvl: Path, run: Path, tmp_path: Path
) -> None:
    refused(lambda: train(cache, student_config(tiny_internvl), run), "initial_weights")
    refused(lambda: train(cache, student_config(tiny_llava).model_copy(update={"max_length": 500}), run), "max_length")
    moved = tmp_path / "moved"
    shutil.copytree(tiny_llava, moved)
    train(cache, student_config(moved), run)  # it is the content that counts
    (run / "training/tiny/align/DONE.json").unlink()
    tokenizer = moved / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"padding_side": "left"}))
    refused(lambda: train(cache, student_config(moved), run), "student_files")


def test_other_data_and_another_cache_are_another_run(
    cache: CacheConfig, tiny_llava: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = Path(cache.data.path).read_text().splitlines()
    fewer = Path(cache.data.path).with_name("fewer.jsonl")
    fewer.write_text("\n".join(lines[:-1]) + "\n")
    data = cache.data.model_copy(update={"path": str(fewer)})
    refused(lambda: train(cache.model_copy(update={"data": data}), student_config(tiny_llava), run), "samples")
    monkeypatch.setattr(TeacherCache, "targets_fingerprint", "of another teacher")
    refused(lambda: train(cache, student_config(tiny_llava), run), "cache: stored .*, asked .*of another teacher")


def refused(act: Callable[[], None], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as raised:
        act()
    assert raised.value.exit_code == 4


def test_every_field_is_decided_upon() -> None:
    """A new field counts until it is listed as free; whoever adds one decides here."""
    assert set(StudentConfig.model_fields) - FREE_OF_STUDENT == {"dtype", "max_length", "method", "lora"}
    assert set(TrainConfig.model_fields) - FREE_OF_TRAINING - PER_STAGE == {"recalibrator", "baselines", "seed"}
    assert set(StageConfig.model_fields) - FREE_OF_STAGE == {
        "max_steps",
        "global_batch_size",
        "learning_rate",
        "final_learning_rate",
        "warmup_steps",
        "weight_decay",
        "adam_betas",
        "adam_epsilon",
        "gradient_clipping",
        "max_samples",
    }
    assert set(TrainConfig.model_fields) >= FREE_OF_TRAINING | PER_STAGE
    assert set(StageConfig.model_fields) >= FREE_OF_STAGE
    assert set(StudentConfig.model_fields) >= FREE_OF_STUDENT
