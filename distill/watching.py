"""How a stage is watched: what its steps are measured and scored with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.config import Stage, StudentConfig, TrainConfig
from distill.model_flops import ModelFlops
from distill.monitors import Place
from distill.processes import Processes
from distill.stages import StageModel
from distill.throughput import peak_tflops
from distill.validation import Validation, open_validation
from distill.zero_config import monitor_sections


@dataclass(frozen=True, kw_only=True)
class Watching:
    """Everything that watches one stage; nothing of it changes what is trained."""

    place: Place
    monitors: Mapping[str, dict[str, Any]]
    """Enabled sections of DeepSpeed's configuration."""
    validation: Validation | None
    flops: ModelFlops | None
    peak_tflops: float | None


def watch_stage(
    stage: Stage,
    *,
    student: StudentConfig,
    train: TrainConfig,
    model: StageModel,
    base: Path,
    output_dir: Path,
    processes: Processes,
) -> Watching:
    """Set up what watches a stage; ``base`` is the untouched student's directory.

    Raises:
        ConfigError: A section of a monitor holds a key.
        DataError: A held-out sample cannot be read.
    """
    # align leaves the student as it is
    config = None if stage == "align" else train.validation
    return Watching(
        place=Place(output_dir=output_dir, student=student.name, stage=stage),
        monitors=monitor_sections(train),
        validation=None if config is None else open_validation(config, student=student, base=base),
        flops=ModelFlops.of_model(model),
        peak_tflops=peak_tflops(processes.device, dtype=student.dtype),
    )
