"""Run by torchrun in two processes: one training under ZeRO-3, with scores on held-out data and without."""

import json
import sys
from pathlib import Path

from distill.config import StudentConfig
from distill.trainer import train_student
from distill.zero import launched_processes
from teacher_cache.config import CacheConfig
from tests.distill.small_runs import STAGE, train_config
from tests.distill.test_validation import LAST, METHODS, validation_settings


def main(folder: Path) -> None:
    inputs = json.loads((folder / "inputs.json").read_text())
    student = StudentConfig.model_validate(inputs["student"])
    for method, stages in METHODS.items():
        for name in ("plain", "scored"):
            validation = validation_settings(Path(inputs["held_out"])) if name == "scored" else None
            train_student(
                cache=CacheConfig.model_validate(inputs["cache"]),
                student=student.model_copy(update={"method": method}),
                train=train_config(
                    backend="zero3",
                    num_processes=2,
                    zero={"persistence_threshold": 0},
                    align=STAGE | {"max_steps": 1},
                    distill=STAGE | {"max_steps": LAST},
                    validation=validation,
                ),
                output_dir=folder / method / name,
                stages=stages,
            )


if __name__ == "__main__":
    with launched_processes(backend="zero3", num_processes=2):
        main(Path(sys.argv[1]))
