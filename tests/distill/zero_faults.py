"""Run by torchrun in two processes: faults on one of them, and the same steps passed over."""

import json
import math
import os
import sys
from pathlib import Path

from distill.config import StudentConfig, TrainConfig
from distill.trainer import train_student
from distill.zero import launched_processes
from teacher_cache.config import CacheConfig
from tests.distill.injected_faults import (
    Forward,
    bad_inputs,
    bad_targets,
    injected,
    passed_over,
    scaled_gradient,
    scaled_loss,
)

# step, rank whose forward pass goes wrong, and how
FAULTS: dict[str, list[tuple[int, int, Forward]]] = {
    "align": [
        (2, 1, bad_targets(math.nan)),
        (3, 0, bad_inputs),
        (5, 1, scaled_loss(math.inf)),
        (6, 0, scaled_gradient(math.nan)),
        (8, 1, scaled_gradient(math.inf)),
        (11, 0, scaled_loss(100.0)),
    ],
    "finetune": [(2, 1, bad_inputs), (4, 0, scaled_loss(math.nan))],
}


def main(folder: Path) -> None:
    inputs = json.loads((folder / "inputs.json").read_text())
    rank = int(os.environ["RANK"])
    for stage, faults in FAULTS.items():
        mine = {step: fault for step, where, fault in faults if where == rank}
        for name, going_wrong in (("faulty", injected(mine)), ("passed", passed_over({step for step, _, _ in faults}))):
            with going_wrong:
                train_student(
                    cache=CacheConfig.model_validate(inputs["cache"]),
                    student=StudentConfig.model_validate(inputs["student"]),
                    train=TrainConfig.model_validate(inputs["train"] | {"stages": [stage]}),
                    output_dir=folder / name / stage,
                )


if __name__ == "__main__":
    # one process group for all runs
    with launched_processes(backend="zero3", num_processes=2):
        main(Path(sys.argv[1]))
