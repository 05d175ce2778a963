"""Run under ZeRO-3 by any number of processes: train runs to their end, list their samples, export at each save."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from distill import loop as loop_module
from distill.checkpoint import Record, save_checkpoint
from distill.config import StudentConfig, TrainConfig
from distill.engine import Engine
from distill.export import export_student
from distill.loader import RankBatches
from distill.processes import Processes
from distill.step import Loop, Outcome, take_step
from distill.trainer import train_student
from distill.zero import launched_processes
from teacher_cache.config import CacheConfig


def train(folder: Path, name: str) -> None:
    """Train one run; ``order-RANK.jsonl`` gets its steps with their samples."""
    inputs = json.loads((folder / "inputs.json").read_text())
    size, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
    run = folder / name
    run.mkdir(exist_ok=True)

    def listing(loop: Loop, batches: RankBatches, *, step: int, **others: Any) -> Outcome | None:
        take = RankBatches.__next__

        def taking(self: RankBatches) -> Any:
            part = take(self)
            ids = [id_ for batch in part.micro_batches for id_ in batch.sample_ids]
            with (run / f"order-{rank}.jsonl").open("a") as file:
                file.write(json.dumps([step, ids]) + "\n")
            return part

        with mock.patch.object(RankBatches, "__next__", taking):
            return take_step(loop, batches, step=step, **others)

    def exporting(engine: Engine, directory: Path, *, record: Record, processes: Processes, keep: int) -> None:
        save_checkpoint(engine, directory, record=record, processes=processes, keep=keep)
        target = run / f"export-{record.step}"
        source, dtype = Path(record.origin["student"]), record.origin["dtype"]
        export_student(engine, target, source=source, dtype=dtype, processes=processes)

    with (
        mock.patch.object(loop_module, "take_step", listing),
        mock.patch.object(loop_module, "save_checkpoint", exporting),
    ):
        train_student(
            cache=CacheConfig.model_validate(inputs["cache"]),
            student=StudentConfig.model_validate(inputs["student"]),
            train=TrainConfig.model_validate(inputs["train"] | {"num_processes": int(size)}),
            output_dir=run,
        )


def main(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        train(folder, name)


if __name__ == "__main__":
    # one process group for all runs
    with launched_processes(backend="zero3", num_processes=int(os.environ.get("WORLD_SIZE", "1"))):
        main(Path(sys.argv[1]), sys.argv[2:])
