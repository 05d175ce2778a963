"""Run by torchrun: the same global batches, cut into micro-batches in other ways."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from distill.config import StudentConfig, TrainConfig
from distill.trainer import train_student
from distill.zero import launched_processes
from teacher_cache.config import CacheConfig

# what each stage gets, and what the whole run does
CUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one": ({"micro_batch_size": 1}, {}),
    "two": ({"micro_batch_size": 2}, {}),
    "four": ({"micro_batch_size": 4}, {}),
    "budget": ({"micro_batch_size": 4, "micro_batch_tokens": 200}, {"data_workers": 1}),
    "packed": ({"micro_batch_size": 4, "micro_batch_tokens": 200}, {"packing": True}),
}
CUTS_OF_ONE_PROCESS = ("two", "budget")
STAGES = ("align", "distill", "finetune")


def main(folder: Path, *, num_processes: int) -> None:
    inputs = json.loads((folder / "inputs.json").read_text())
    for name in CUTS if num_processes > 1 else CUTS_OF_ONE_PROCESS:
        stage_changes, changes = CUTS[name]
        stages = {stage: inputs["train"][stage] | stage_changes for stage in STAGES}
        settings = inputs["train"] | stages | changes | {"num_processes": num_processes}
        train_student(
            cache=CacheConfig.model_validate(inputs["cache"]),
            student=StudentConfig.model_validate(inputs["student"]),
            train=TrainConfig.model_validate(settings),
            output_dir=folder / f"{name}-{num_processes}",
        )


if __name__ == "__main__":
    # one process group for all runs
    processes = int(os.environ["WORLD_SIZE"])
    with launched_processes(backend="zero3", num_processes=processes):
        main(Path(sys.argv[1]), num_processes=processes)
