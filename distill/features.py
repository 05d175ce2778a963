"""Mean-pooled features of a fixed probe, for looking at what the Recalibrator does to them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from distill.batch import Batch
from distill.data import JoinedData
from distill.engine import Engine
from distill.processes import Processes
from distill.records import to_device

PROBE_SAMPLES = 64


def probe_batches(data: JoinedData, *, micro_batch_size: int) -> list[Batch]:
    """Return the first samples in data order, those with the teacher's question rows preferred.

    The same for every process and every step; empty in stages without a Recalibrator.
    """
    if not data.spec.with_recalibrator:
        return []
    with_questions = dataclasses.replace(data, spec=data.spec.with_regularization(1.0))
    joined = with_questions.load(range(min(PROBE_SAMPLES, len(data.sample_ids))))
    complete = [s for s in joined if s.targets is not None and s.targets.question_hidden_states is not None]
    chosen = complete or joined
    probe = with_questions if complete else dataclasses.replace(data, spec=data.spec.with_regularization(0.0))
    return [
        probe.collate(chosen[start : start + micro_batch_size]) for start in range(0, len(chosen), micro_batch_size)
    ]


def write_features(engine: Engine, probe: Sequence[Batch], path: Path, *, processes: Processes) -> None:
    """Write the probe's features, one row per sample: z_s, r_s, and with tier Q z_l, r_l; every process calls this.

    ``z`` are question rows as they enter the Recalibrator, ``r`` its outputs; s from the student, l from the teacher.
    """
    if not probe:
        return
    engine.model.eval()
    with torch.no_grad():
        parts = [engine.forward(batch=to_device(batch, processes.device), task="features") for batch in probe]
    if processes.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        features = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
        temporary = path.with_suffix(".tmp")
        save_file(features, temporary)
        # a report may be written meanwhile
        temporary.replace(path)
