"""Run by torchrun in two processes: whole trainings, one stopped and resumed, uneven steps, one in bfloat16."""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distill.config import Method, Stage, StudentConfig, TrainConfig
from distill.processes import Processes
from distill.trainer import train_student
from distill.zero import launched_processes
from teacher_cache.config import CacheConfig
from tests.distill.engine_runs import EngineRun, run_uneven_steps

# methods whose distill stage differs from the paper's, and what they change in the settings
OTHER_METHODS: dict[str, tuple[Method, dict[str, Any]]] = {
    "stand-ins": ("genrecal", {"stages": ["distill"], "recalibrator": {"student_answer_fraction": 0.7}}),
    "uld": ("uld", {"baselines": {"source": "rows"}}),
}

OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}
LORA = {"rank": 4}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Settings of a run of steps through an engine."""

    stage: Stage = "distill"
    train: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    student: dict[str, Any] = field(default_factory=dict)


ENGINE_RUNS = {
    "align": Variant(stage="align"),
    "distill": Variant(),
    "offload": Variant(zero={"overrides": OFFLOAD}),
    "recomputing": Variant(train={"gradient_checkpointing": True}),
    "in-shares": Variant(zero={"init_on_load": True}),
    "adapters": Variant(student={"lora": LORA}),
    "adapters-in-shares-offloaded": Variant(
        student={"lora": LORA},
        train={"gradient_checkpointing": True},
        zero={"init_on_load": True, "overrides": OFFLOAD},
    ),
    "bfloat16": Variant(student={"dtype": "bfloat16"}),
    "bfloat16-in-shares": Variant(student={"dtype": "bfloat16"}, zero={"init_on_load": True}),
}


def run_variant(inputs: dict[str, Any], variant: Variant, *, processes: Processes, backend: str = "zero3") -> EngineRun:
    """Take the uneven steps with a variant's settings; the torch backend leaves out what is about memory."""
    train = inputs["train"] | {"backend": backend}
    if backend == "zero3":
        train |= variant.train | {"zero": inputs["train"]["zero"] | variant.zero}
    return run_uneven_steps(
        inputs | {"student": inputs["student"] | variant.student},
        stage=variant.stage,
        processes=processes,
        train=TrainConfig.model_validate(train),
    )


def stop_once_logged(path: Path, *, lines: int) -> None:
    """Send this process SIGTERM when a metrics file has so many lines."""

    def watch() -> None:
        while not path.exists() or len(path.read_text().splitlines()) < lines:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main(folder: Path, processes: Processes) -> None:
    inputs = json.loads((folder / "inputs.json").read_text())
    train = TrainConfig.model_validate(inputs["train"])
    common: dict[str, Any] = {"cache": CacheConfig.model_validate(inputs["cache"])}
    student = StudentConfig.model_validate(inputs["student"])
    train_student(**common, student=student, train=train, output_dir=folder / "whole")

    halted = folder / "halted"
    # one process of two gets the signal, both must stop at the same step
    if os.environ["RANK"] == "1":
        stop_once_logged(halted / "training/tiny/align/metrics.jsonl", lines=1)
    code = None
    try:
        train_student(**common, student=student, train=train, output_dir=halted)
    except SystemExit as stopped:
        code = stopped.code
    (halted / f"exit-code-{os.environ['RANK']}").write_text(str(code))
    train_student(**common, student=student, train=train, output_dir=halted)

    for name, (method, changes) in OTHER_METHODS.items():
        other = student.model_copy(update={"method": method})
        settings = TrainConfig.model_validate(inputs["train"] | changes)
        train_student(**common, student=other, train=settings, output_dir=folder / name, stages=["distill"])

    for name, variant in ENGINE_RUNS.items():
        run = run_variant(inputs, variant, processes=processes)
        if processes.rank == 0:
            torch.save(run, folder / f"engine-{name}.pt")

    bfloat16 = student.model_copy(update={"dtype": "bfloat16"})
    recomputing = train.model_copy(update={"gradient_checkpointing": True})
    train_student(**common, student=bfloat16, train=recomputing, output_dir=folder / "bfloat16", stages=["align"])


if __name__ == "__main__":
    # one process group for all scenarios
    with launched_processes(backend="zero3", num_processes=2) as joined:
        main(Path(sys.argv[1]), joined)
