"""Whole trainings of several students from one cache, capture included, against as many with the teacher live."""

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_bench.figures import Figure
from cache_bench.page_cache import FileSet

from distill.config import STAGES, StudentConfig, TrainConfig
from distill.live import TargetSource
from distill.trainer import train_student
from train_bench.inputs import Inputs

SECTION = "trainings"
AHEAD = 1.0
WAIT_BAR = 0.02


@dataclass(frozen=True, kw_only=True)
class Training:
    """One student through all stages."""

    steps: list[list[dict[str, Any]]]
    """Metrics of each step, by stage."""
    wall_s: float

    @property
    def step_s(self) -> float:
        """Seconds in steps, waiting for data included."""
        return sum(record["time/step_s"] for stage in self.steps for record in stage)


def measure(inputs: Inputs, folder: Path) -> Iterator[Figure]:
    """Yield how far ahead the cache is, and how long training waits for it."""
    cached, live = [], []
    for number, student in enumerate(inputs.students.values()):
        sides: list[tuple[list[Training], TargetSource | None]] = [(cached, None), (live, inputs.captured.live)]
        for trainings, targets in sides if number % 2 else reversed(sides):
            FileSet.under(folder / "cache").drop()
            trainings.append(_train(inputs, student, targets=targets, folder=folder / f"run-{len(cached)}-{len(live)}"))
    # one load of the teacher each way: the cache needs one, and whoever trains one student after the other another
    cached_s = inputs.captured.seconds + sum(training.step_s for training in cached)
    live_s = sum(training.step_s for training in live)
    yield Figure(
        section=SECTION,
        name=f"{len(cached)} students from one cache, capture included, against as many with the teacher live",
        value=live_s / cached_s,
        bar=AHEAD,
        note=(
            f"{cached_s:.0f} s, of which {inputs.captured.seconds:.0f} s capture, and {live_s:.0f} s; one epoch of "
            f"{inputs.settings.trainings_samples} samples in each of {', '.join(STAGES)}; with start-up, exports and "
            f"features {inputs.captured.seconds + _wall_s(cached):.0f} s and {_wall_s(live):.0f} s"
        ),
        json_name="students_speedup_over_live_teacher",
    )
    yield _waiting([record for training in cached for stage in training.steps for record in stage[1:]], cached)


def _train(inputs: Inputs, student: StudentConfig, *, targets: TargetSource | None, folder: Path) -> Training:
    stage = {**inputs.settings.stage, "max_samples": inputs.settings.trainings_samples}
    train = TrainConfig.model_validate({**dict.fromkeys(STAGES, stage), "encoding_cache_mib": 0})
    start = time.perf_counter()
    train_student(cache=inputs.cache, student=student, train=train, output_dir=folder, targets=targets)
    wall_s = time.perf_counter() - start
    paths = [folder / "training" / student.name / name / "metrics.jsonl" for name in STAGES]
    records = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
    return Training(steps=[[one for one in stage if "time/step_s" in one] for stage in records], wall_s=wall_s)


def _wall_s(trainings: list[Training]) -> float:
    return sum(training.wall_s for training in trainings)


def _waiting(records: list[dict[str, Any]], trainings: list[Training]) -> Figure:
    """Return the share of the steps that was spent waiting, without each stage's first: nothing is ahead of it."""
    waited_s = sum(record["data/wait_fraction"] * record["time/step_s"] for record in records)
    step_s = sum(record["time/step_s"] for record in records)
    first = [stage[0]["data/wait_fraction"] for training in trainings for stage in training.steps]
    return Figure(
        section=SECTION,
        name="waiting for data with the cache on a local disk, not in memory",
        value=waited_s / step_s,
        unit="of the step",
        bar=WAIT_BAR,
        at_most=True,
        note=(
            f"{len(records)} steps of {step_s / len(records):.2f} s; in the first step of a stage, for which nothing "
            f"is made ahead, {statistics.median(first):.2g}"
        ),
        json_name="data_wait_fraction",
    )
