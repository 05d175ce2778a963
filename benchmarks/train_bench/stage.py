"""One stage of a student outside the trainer: its model, and its micro-batches from the cache or a live teacher."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from distill.batch import Batch
from distill.config import Stage, StudentConfig, TrainConfig
from distill.data import JoinedData, StudentEncoder, join_cache
from distill.engine import Engine
from distill.live import TargetSource
from distill.stage_spec import StageSpec, stage_spec
from distill.stage_sums import Counts, batch_counts
from distill.stages import StageModel
from distill.student import load_student, resolve_model
from recalibrator import Recalibrator, RecalibratorConfig
from teacher_cache.chat import load_processor
from teacher_cache.samples import read_samples
from train_bench.inputs import Inputs

LEARNING_RATE = 1e-5


def make_spec(stage: Stage, train: TrainConfig) -> StageSpec:
    """Return what a stage of the paper's method does."""
    return stage_spec(stage, method="genrecal", train=train, has_images=True)


def make_data(inputs: Inputs, source: TargetSource, *, student: StudentConfig, spec: StageSpec) -> JoinedData:
    """Join a source of targets with all samples."""
    encoder = StudentEncoder(load_processor(student.model), config=student, memory_mib=512)
    return join_cache(source, read_samples(inputs.cache.data), encoder=encoder, spec=spec, max_samples=None)


def make_model(source: TargetSource, *, student: StudentConfig, spec: StageSpec) -> StageModel:
    """Load the student, and put a new Recalibrator beside it."""
    model = load_student(resolve_model(student.model), dtype=student.dtype)
    torch.manual_seed(0)
    recalibrator = Recalibrator(
        RecalibratorConfig(student_config=model.config.get_text_config(), teacher_hidden=source.hidden_size)
    )
    return StageModel(spec, student=model, recalibrator=recalibrator, teacher_head=source.teacher_head())


def micro_batches(data: JoinedData, config: Mapping[str, Any]) -> list[Batch]:
    """Join and collate one global batch: the first samples."""
    groups = np.arange(config["global_batch_size"]).reshape(-1, config["micro_batch_size"])
    return [data.batch(group.tolist()) for group in groups]


def total_counts(batches: list[Batch]) -> Counts:
    """Return the supervised tokens of a global batch."""
    return Counts(*np.sum([batch_counts(batch) for batch in batches], axis=0).tolist())


def take_step(engine: Engine, batches: list[Batch]) -> None:
    """Take one optimizer step."""
    counts = total_counts(batches)
    engine.model.train()
    for batch in batches:
        engine.backward(engine.forward(batch=batch, counts=counts).loss)
    engine.step(learning_rate=LEARNING_RATE)
