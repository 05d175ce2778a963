"""A student's Recalibrator as the run file shapes it, and the refusal of students that cannot have one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from distill.config import Stage, StudentConfig, TrainConfig
from distill.student import empty_student
from recalibrator import Recalibrator, RecalibratorConfig
from teacher_cache.errors import ConfigError


def build_recalibrator(text_config: Any, *, teacher_hidden: int, train: TrainConfig) -> Recalibrator:
    """Return a fresh Recalibrator for a student with this text config.

    Raises:
        ConfigError: The student's family cannot have one.
    """
    options = train.recalibrator
    config = RecalibratorConfig(
        student_config=text_config,
        teacher_hidden=teacher_hidden,
        num_blocks=options.num_blocks,
        output_norm=options.output_norm,
        projection_bias=options.projection_bias,
        positions=options.positions,
        rope_theta=options.rope_theta,
        gradient_checkpointing=train.gradient_checkpointing,
    )
    torch.manual_seed(train.seed)
    try:
        return Recalibrator(config)
    except ValueError as error:
        raise ConfigError(
            f"{error}. Take a student of another family, such as Llama, Qwen2 or Qwen3, or train this one by method "
            "sft, kd or uld"
        ) from error


def copy_student_blocks(recalibrator: Recalibrator, student: Any) -> None:
    """Start the blocks from the student's last ones.

    Raises:
        ConfigError: Those are too few, or have other weights.
    """
    try:
        recalibrator.copy_blocks(student.get_decoder().layers)
    except ValueError as error:
        raise ConfigError(f"{error}. Set train.recalibrator.init_from_student to false") from error


def check_recalibrator(path: Path, *, student: StudentConfig, train: TrainConfig, stages: Sequence[Stage]) -> None:
    """Build the student's Recalibrator without memory, before data and weights are read.

    Raises:
        ConfigError: The student cannot have one as the run file asks for it.
    """
    if student.method != "genrecal" or not {"align", "distill"} & {*stages}:
        return
    trusted = student.trust_remote_code
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trusted).get_text_config()
        recalibrator = build_recalibrator(config, teacher_hidden=1, train=train)
        if train.recalibrator.init_from_student:
            copy_student_blocks(recalibrator, empty_student(path, dtype=student.dtype, trust_remote_code=trusted))
