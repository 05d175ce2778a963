"""What a builder may be doing when it is interrupted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from teacher_cache.gc import collect_garbage
from teacher_cache.repair import repair_cache
from teacher_cache.schema import TeacherTargets
from teacher_cache.writer import CacheWriter
from tests.teacher_cache.store import build, commit, flip_bit, make_samples, open_builder

SAMPLES = {sample.sample_id: sample for sample in make_samples(3)}
FIRST, LAST = list(SAMPLES.values())[:2], list(SAMPLES.values())[2:]
ALL = FIRST + LAST
CREATED, COMPLETE, DROPPED = "created", "complete", "dropped"
"""Acknowledgements beside the ids of samples."""

Acknowledge = Callable[..., None]
"""Takes what holds from now on, whatever happens."""
Act = Callable[[Path, Acknowledge], None]
"""Works on a cache and tells what it has acknowledged."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A run that can be interrupted anywhere, and be taken up again."""

    name: str
    prepare: Callable[[Path], None]
    """Make the cache as the run finds it."""
    act: Act
    """The run."""
    resume: Act
    """What a user does after an interruption; brings the work to its end."""
    acknowledged: frozenset[str]
    """What holds before the run."""
    samples: Sequence[TeacherTargets]
    """What the cache holds in the end."""
    drops_questions: bool = False
    damaged: frozenset[str] = frozenset()
    """Samples that are to be computed again."""


def ignore(*acknowledged: str) -> None:
    """Forget what was acknowledged."""


def _nothing(root: Path) -> None:
    assert not root.exists()


def _one_of_three_shards(root: Path) -> None:
    writer = open_builder(root, ALL, per_shard=1)
    commit(writer, writer.missing_shards()[0], ALL)


def _two_shards(root: Path) -> None:
    build(root, FIRST, per_shard=1)


def _complete(root: Path) -> None:
    build(root, ALL, per_shard=1)


def _damaged(root: Path) -> None:
    _complete(root)
    (path,) = root.glob("shards/00002-*/hidden_states/c.0.0")
    flip_bit(path, byte=3, bit=1)


def _create(root: Path, acknowledge: Acknowledge) -> None:
    open_builder(root, LAST, per_shard=1)
    acknowledge(CREATED)


def _build(root: Path, acknowledge: Acknowledge) -> None:
    _commit_missing(open_builder(root, ALL, per_shard=1), acknowledge)


def _extend(root: Path, acknowledge: Acknowledge) -> None:
    _commit_missing(open_builder(root, ALL, per_shard=1, extend=True), acknowledge)


def _commit_missing(writer: CacheWriter, acknowledge: Acknowledge) -> None:
    acknowledge(CREATED)
    for shard in writer.missing_shards():
        commit(writer, shard, ALL)
        acknowledge(*shard.sample_ids)
    assert writer.complete()
    for shard in writer.plan.shards:
        acknowledge(*shard.sample_ids)
    acknowledge(COMPLETE)


def _repair(root: Path, acknowledge: Acknowledge) -> None:
    assert not repair_cache(str(root)).beyond_repair


def _repair_and_build(root: Path, acknowledge: Acknowledge) -> None:
    _repair(root, acknowledge)
    _build(root, acknowledge)


def _drop_questions(root: Path, acknowledge: Acknowledge) -> None:
    collect_garbage(str(root), drop_question_rows=True)
    acknowledge(DROPPED)


_IDS = frozenset(SAMPLES)
CREATE = Scenario(
    name="create",
    prepare=_nothing,
    act=_create,
    resume=lambda root, acknowledge: _commit_missing(open_builder(root, LAST, per_shard=1), acknowledge),
    acknowledged=frozenset(),
    samples=LAST,
)
BUILD = Scenario(
    name="build",
    prepare=_one_of_three_shards,
    act=_build,
    resume=_build,
    acknowledged=frozenset({CREATED, ALL[0].sample_id}),
    samples=ALL,
)
EXTEND = Scenario(
    name="extend",
    prepare=_two_shards,
    act=_extend,
    resume=_extend,
    acknowledged=frozenset({CREATED, COMPLETE, *(sample.sample_id for sample in FIRST)}),
    samples=ALL,
)
DROP = Scenario(
    name="drop",
    prepare=_complete,
    act=_drop_questions,
    resume=_drop_questions,
    acknowledged=_IDS | {CREATED, COMPLETE},
    samples=ALL,
    drops_questions=True,
)
REPAIR = Scenario(
    name="repair",
    prepare=_damaged,
    act=_repair,
    resume=_repair_and_build,
    acknowledged=_IDS - {ALL[2].sample_id} | {CREATED},
    samples=ALL,
    damaged=frozenset({ALL[2].sample_id}),
)
SCENARIOS = {scenario.name: scenario for scenario in (CREATE, BUILD, EXTEND, DROP, REPAIR)}
PARAMETERS = [
    pytest.param(scenario, id=name, marks=() if scenario in (CREATE, REPAIR) else pytest.mark.slow)
    for name, scenario in SCENARIOS.items()
]
"""For tests that interrupt a scenario at each of its steps: the short ones have some dozen, the others hundreds."""
