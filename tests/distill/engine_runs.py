"""One stage through an engine, without the trainer: any number of micro-batches per step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.adapters import add_adapters
from distill.config import Stage, StudentConfig, TrainConfig
from distill.data import join_cache
from distill.encoder import StudentEncoder
from distill.engine import Engine
from distill.processes import Processes
from distill.stage_spec import stage_spec
from distill.stage_sums import Counts, batch_counts
from distill.stages import StageModel
from distill.zero import load_for_backend, make_engine
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
    initial: dict[str, Tensor] = field(default_factory=dict)
    """Before the first step."""
    frozen: dict[str, Tensor] = field(default_factory=dict)
    """Of these, those that do not train."""
    facts: dict[str, Any] = field(default_factory=dict)


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
    spec = stage_spec(
        stage, method=student.method, train=train, has_images=True, with_adapters=student.lora is not None
    )
    encoder = StudentEncoder(load_processor(student.model), config=student, memory_mib=1)
    opened = open_cache(cache.uri)
    data = join_cache(opened, read_samples(cache.data), encoder=encoder, spec=spec, max_samples=None)
    model = load_for_backend(
        Path(student.model),
        stage=stage,
        train=train,
        dtype=student.dtype,
        trust_remote_code=False,
        processes=processes,
    )
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    shape = RecalibratorConfig(student_config=model.config.get_text_config(), teacher_hidden=opened.hidden_size)
    recalibrator = Recalibrator(shape).to(getattr(torch, student.dtype))
    if student.lora is not None:
        add_adapters(model, student.lora, seed=0)
    composite = StageModel(spec, student=model, recalibrator=recalibrator, teacher_head=opened.teacher_head())
    engine = make_engine(composite, stage=stage, train=train, dtype=student.dtype, processes=processes)
    run = EngineRun()
    assert composite.teacher_head is not None
    head = composite.teacher_head.weight
    frozen = {name for name, parameter in composite.named_parameters() if not parameter.requires_grad}
    run.initial = _whole_parameters(engine)
    run.frozen = {name: values for name, values in run.initial.items() if name in frozen}
    for number, step in enumerate(plan):
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
        # measured before the step, and in it
        measured = [engine.gradient_norm()] if number % 2 else []
        run.norms += [*measured, engine.step(learning_rate=1e-3)][:1]
    run.parameters = _whole_parameters(engine)
    run.facts = _facts(engine) | {"head_stayed": engine.model.teacher_head.weight is head}
    engine.close()
    return run


def _whole_parameters(engine: Engine) -> dict[str, Tensor]:
    values = {}
    for name, parameter in engine.model.named_parameters():
        with engine.gathered(parameter):
            values[name] = parameter.detach().clone()
    return values


def _facts(engine: Engine) -> dict[str, Any]:
    model, head = engine.model, engine.model.teacher_head
    assert head is not None
    zero: Any = getattr(engine, "_optimizer", None)
    return {
        "parameter_dtypes": {str(parameter.dtype) for parameter in model.parameters()},
        "master_dtypes": {str(master.dtype) for master in getattr(zero, "fp32_partitioned_groups_flat", [])},
        "gradient_sum_dtypes": {
            str(sums.dtype) for sums in [getattr(zero, "grad_partitions_flat_buffer", None)] if sums is not None
        },
        "moment_dtypes": {
            str(value.dtype)
            for state in zero.state.values()
            for name, value in state.items()
            if name.startswith("exp_avg")
        },
        "rotary_dtypes": {str(b.dtype) for name, b in model.named_buffers() if name.endswith("inv_freq")},
        # a plain tensor: no parameter, no buffer, nothing of ZeRO-3's
        "head_shape": tuple(head.weight.shape),
        "head_is_plain": type(head.weight) is Tensor
        and not hasattr(head.weight, "ds_id")
        and not head.weight.requires_grad
        and not any("teacher_head" in name for name in (*dict(model.named_parameters()), *model.state_dict())),
        "partition": engine.partition_report(),
    }
