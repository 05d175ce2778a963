"""One run of a study: train, score, keep the figures, throw the weights away."""

import json
import logging
import platform
import time
from collections.abc import Collection, Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np

from distill.config import STAGES, StudentConfig, TrainConfig
from distill.live import TargetSource
from distill.stage_spec import stage_spec
from distill.trainer import own_stages, train_student
from launch.study.config import Arm, StudyConfig
from launch.study.grid import Cell, cell_digest, cell_folder, make_cell
from launch.study.inputs import MAX_LENGTH, Inputs, read_capture
from launch.study.records import STUDENT, Scores, Spent, load_teacher, read_spent, save_teacher, throw_away_weights
from launch.study.results import RESULT, Row, read_rows, write_rows
from launch.study.scores import score_model
from teacher_cache import open_cache
from teacher_cache.config import DataConfig
from teacher_cache.errors import DataError
from teacher_cache.reader import TeacherCache
from teacher_cache.schema import TIERS, TeacherTargets, Tier

logger = logging.getLogger(__name__)

ANSWERS: tuple[Tier, ...] = ("A",)
PACKAGES = ("genrecal", "torch", "transformers", "numpy")


class ShuffledTargets:
    """A cache in which each sample has the teacher's targets of another sample with as many answers."""

    def __init__(self, cache: TeacherCache, *, seed: int) -> None:
        """Draw a permutation without fixed points among the samples of each number of answers."""
        self._cache = cache
        self.sample_ids, self.skipped, self.hidden_size = cache.sample_ids, cache.skipped, cache.hidden_size
        self.targets_fingerprint = f"{cache.targets_fingerprint} shuffled by {seed}"
        self.sample_digest, self.num_tokens = cache.sample_digest, cache.num_tokens
        self.teacher_head = cache.teacher_head
        turns: dict[int, list[str]] = {}
        for targets in cache.read(cache.sample_ids, tiers=ANSWERS):
            turns.setdefault(len(targets.spans), []).append(targets.sample_id)
        rng = np.random.default_rng(seed)
        self._other: dict[str, str] = {}
        for ids in turns.values():
            order = rng.permutation(len(ids))
            self._other |= {ids[a]: ids[b] for a, b in zip(order, np.roll(order, 1), strict=True)}

    def read(self, sample_ids: Iterable[str], *, tiers: Collection[Tier] = TIERS) -> list[TeacherTargets]:
        """Return the targets of each sample's other."""
        return self._cache.read([self._other[sample_id] for sample_id in sample_ids], tiers=tiers)

    def __len__(self) -> int:
        return len(self._cache)


def score_teacher(config: StudyConfig, name: str) -> None:
    """Score a teacher and keep its side of the comparison, unless it is kept already."""
    inputs = Inputs(config=config)
    if not inputs.scores_file(name).exists():
        scores, own = score_model(
            inputs.teacher(name), data=_held_out(inputs), evaluation=config.evaluation, teacher=None
        )
        save_teacher(scores, own, inputs.scores_file(name))


def run_cell(config: StudyConfig, cell: Cell) -> None:
    """Do one run and write its rows; what a killed call trained is taken up again."""
    inputs, folder = Inputs(config=config), cell_folder(config, cell)
    began = time.monotonic()
    if cell.arm.method == "untouched":
        scores = _score(inputs, inputs.student(cell.student), teacher=cell.teacher)
        write_rows([_row(config, cell, name=cell.arm.name, scores=scores, spent=None)], folder / RESULT)
        return
    train = scaled_train(config, cell)
    student = StudentConfig(
        name=STUDENT,
        model=str(inputs.student(cell.student)),
        dtype="float32",
        max_length=MAX_LENGTH,
        method=cell.arm.method,
    )
    cache = inputs.cache(*inputs.cache_of(cell))
    targets: TargetSource | None = None
    if cell.arm.shuffled_targets:
        targets = ShuffledTargets(open_cache(cache.uri), seed=cell.seed)
    train_student(cache=cache, student=student, train=train, output_dir=folder, targets=targets)
    stages = own_stages(student, train)
    rows = []
    for stage in stages:
        is_last = stage == stages[-1]
        if is_last or stage in cell.arm.scored_stages:
            scores = _score(inputs, folder / "training" / STUDENT / stage / "export", teacher=cell.teacher)
            name = cell.arm.name if is_last else f"{cell.arm.name}@{stage}"
            spent = read_spent(folder, stages[: stages.index(stage) + 1])
            rows.append(_row(config, cell, name=name, scores=scores, spent=spent, train=train))
    write_rows(rows, folder / RESULT)
    throw_away_weights(folder)
    logger.info("%s: %.0f s", cell.name, time.monotonic() - began)


def scaled_train(config: StudyConfig, cell: Cell) -> TrainConfig:
    """Return the training settings of a run, its steps scaled to another arm's FLOPs where the arm says so.

    Raises:
        DataError: A run that has the figures for it is not there.
    """
    train, equal = config.train_config(cell.arm, seed=cell.seed), cell.arm.equal_flops
    if equal is None:
        return train
    budget = _finished(config, cell, arm=equal.to)
    own = _finished(config, cell, arm=equal.like)
    wanted = budget.student_flops if equal.budget == "student" else budget.total_flops
    ratio = wanted / own.student_flops
    steps = {
        stage: {"max_steps": max(1, round(ratio * (train.stage(stage).max_steps or 0)))}
        for stage in STAGES
        if train.stage(stage).max_steps is not None
    }
    values = train.model_dump(mode="json")
    for stage, changes in steps.items():
        values[stage] |= changes
    return TrainConfig.model_validate(values)


def _finished(config: StudyConfig, cell: Cell, *, arm: str) -> Row:
    other = make_cell(config, arm, student=cell.student, teacher=cell.teacher, seed=cell.seed)
    path = cell_folder(config, other) / RESULT
    if not path.exists():
        raise DataError(f"{cell.name} needs the FLOPs of {other.name}, which has no result: add it to the grid")
    return next(row for row in read_rows(path) if row.arm == arm)


def _score(inputs: Inputs, model: Path, *, teacher: str | None) -> Scores:
    name = teacher or inputs.config.teachers[0].name
    _, own = load_teacher(inputs.scores_file(name))
    scores, _ = score_model(model, data=_held_out(inputs), evaluation=inputs.config.evaluation, teacher=own)
    return scores


def _held_out(inputs: Inputs) -> DataConfig:
    return DataConfig(path=str(inputs.test_file), max_length=MAX_LENGTH)


def _row(
    config: StudyConfig,
    cell: Cell,
    *,
    name: str,
    scores: Scores,
    spent: Spent | None,
    train: TrainConfig | None = None,
) -> Row:
    inputs = Inputs(config=config)
    flops = 0.0 if spent is None else spent.flops
    capture, cache_bytes = 0.0, 0
    if spent is not None and train is not None and cell.arm.method != "sft":
        cost = read_capture(inputs.capture_file(*inputs.cache_of(cell)))
        tiers = read_tiers(cell.arm, train=train)
        capture = cost.flops * cell.arm.data_fraction
        cache_bytes = round(sum(cost.tier_bytes.get(tier, 0) for tier in tiers) * cell.arm.data_fraction)
    return Row(
        arm=name,
        seed=cell.seed,
        student=cell.student,
        teacher=cell.teacher,
        **asdict(scores),
        student_flops=flops,
        capture_flops=capture,
        total_flops=flops + capture / sharing_students(config, cell),
        cache_bytes=cache_bytes,
        seconds=0.0 if spent is None else spent.seconds,
        **({} if spent is None else spent.gaps),
        versions=json.dumps({"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}),
        config_digest=cell_digest(config, cell),
        folder=str(cell_folder(config, cell).relative_to(config.output_dir)),
    )


def sharing_students(config: StudyConfig, cell: Cell) -> int:
    """Return how many students the study trains from the teacher of a run: they share the cost of its capture."""
    pairs = {(pair.student, pair.teacher) for part in config.grid for pair in part.pairs}
    return max(1, sum(teacher == cell.teacher for _, teacher in pairs))


def read_tiers(arm: Arm, *, train: TrainConfig) -> set[Tier]:
    """Return the tiers that the stages of an arm read."""
    if arm.method == "untouched":
        return set()
    student = StudentConfig(name=STUDENT, model="", method=arm.method)
    specs = [
        stage_spec(stage, method=student.method, train=train, has_images=True) for stage in own_stages(student, train)
    ]
    return {tier for spec in specs for tier in spec.tiers}
