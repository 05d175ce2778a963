"""Settings of small runs on the plain-torch backend, and what they logged."""

import json
from pathlib import Path
from typing import Any

from distill.config import StudentConfig, TrainConfig
from distill.trainer import train_student
from teacher_cache.config import CacheConfig

GAPS = {f"train/{rows}_shuffle_gap" for rows in ("question", "boundary", "rest")}
STAGE = {"global_batch_size": 6, "micro_batch_size": 3, "max_steps": 3, "learning_rate": 1e-3}


def train_config(**changes: Any) -> TrainConfig:
    stages = {"align": STAGE, "distill": STAGE, "finetune": STAGE}
    settings = {"backend": "torch", "save_interval_steps": 1, "shuffle_gap_interval_steps": 2, **stages}
    return TrainConfig.model_validate(settings | changes)


def student_config(path: Path, **changes: Any) -> StudentConfig:
    return StudentConfig(name="tiny", model=str(path), dtype="float32", max_length=512, **changes)


def read_metrics(output_dir: Path, stage: str) -> list[dict[str, Any]]:
    path = output_dir / "training" / "tiny" / stage / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop what depends on the clock."""
    return [
        {k: v for k, v in record.items() if k.split("/")[0] in ("global_step", "train", "optim")} for record in records
    ]


def continue_align(cache: CacheConfig, student: Path, output_dir: Path, **changes: Any) -> None:
    train_student(
        cache=cache,
        student=student_config(student),
        train=train_config(**changes),
        output_dir=output_dir,
        stages=["align"],
    )
