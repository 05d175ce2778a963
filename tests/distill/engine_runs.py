"""One stage through an engine, without the trainer: any number of micro-batches per step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.config import Stage, StudentConfig, TrainConfig
from distill.data import StudentEncoder, join_cache
from distill.processes import Processes
from distill.stage_spec import stage_spec
from distill.stage_sums import Counts, batch_counts
from distill.stages import StageModel
from distill.student import load_student
from distill.zero import make_engine
from recalibrator import Recalibrator, RecalibratorConfig
from teacher_cache import open_cache
from teacher_cache.chat import load_processor
from teacher_cache.config import CacheConfig
from teacher_cache.samples import read_samples

# per step, per micro-batch, per process: which samples; other numbers of micro-batches and samples at every step
UNEVEN = (
    (((0, 1), (2,)), ((3,), (4, 5)), ((6,), (7,))),
    (((8, 9, 10), (11,)),),
    (((12,), (13, 14)), ((15,), (16,)), ((17,), (0, 2)), ((4, 6), (8,))),
    (((1, 3), (5, 7)), ((9,), (11, 13))),
)


@dataclass
class EngineRun:
    """What one process saw."""

    norms: list[float] = field(default_factory=list)
    """Gradient norm of each step."""
    losses: list[float] = field(default_factory=list)
    """Loss of each step, summed over processes."""
    parameters: dict[str, Tensor] = field(default_factory=dict)
    """After the last step."""


def run_uneven_steps(
    inputs: dict[str, Any],
    *,
    stage: Stage,
    processes: Processes,
    train: TrainConfig,
    plan: Sequence[Any] = UNEVEN,
) -> EngineRun:
    """Take the steps of a plan with this process's share of it; one process takes the shares of all."""
    cache, student = CacheConfig.model_validate(inputs["cache"]), StudentConfig.model_validate(inputs["student"])
    spec = stage_spec(stage, method=student.method, train=train, has_images=True)
    encoder = StudentEncoder(load_processor(student.model), config=student, memory_mib=1)
    opened = open_cache(cache.uri)
    data = join_cache(opened, read_samples(cache.data), encoder=encoder, spec=spec, max_samples=None)
    model = load_student(Path(student.model), dtype=student.dtype)
    torch.manual_seed(0)
    shape = RecalibratorConfig(student_config=model.config.get_text_config(), teacher_hidden=opened.hidden_size)
    recalibrator = Recalibrator(shape).to(getattr(torch, student.dtype))
    composite = StageModel(spec, student=model, recalibrator=recalibrator, teacher_head=opened.teacher_head())
    engine = make_engine(composite, stage=stage, train=train, dtype=student.dtype, processes=processes)
    run = EngineRun()
    for step in plan:
        mine = [
            share[rank]
            for share in step
            for rank in ([processes.rank] if processes.world_size > 1 else range(len(share)))
        ]
        batches = [data.batch(indices) for indices in mine]
        counts = Counts(*processes.sum(np.sum([batch_counts(batch) for batch in batches], axis=0).tolist()))
        engine.model.train()
        loss = 0.0
        for batch in batches:
            part = engine.forward(batch=batch, counts=counts).loss
            engine.backward(part)
            loss += float(part.detach())
        run.losses += processes.sum([loss])
        run.norms.append(engine.step(learning_rate=1e-3))
    for name, parameter in engine.model.named_parameters():
        with engine.gathered(parameter):
            run.parameters[name] = parameter.detach().clone()
    engine.close()
    return run
