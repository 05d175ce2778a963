"""The study file: data, models, arms and the grid of runs. Imports pydantic only, to keep the CLI quick."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from distill.config import STAGES, Stage, TrainConfig
from launch.config_faults import describe_faults
from launch.config_yaml import OutputFolder, read_yaml
from teacher_cache.config import BuildConfig, StrictConfig, TargetsConfig
from teacher_cache.errors import ConfigError

Name = str
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Family = Literal["internvl", "llava", "qwen2-vl"]
ArmMethod = Literal["untouched", "sft", "kd", "uld", "genrecal"]
Budget = Literal["student", "total"]

TEACHERLESS: frozenset[str] = frozenset({"untouched", "sft"})
"""Methods whose result no teacher decides: they run once per student, whatever the teachers of its pairs."""


class StudyData(StrictConfig):
    """Digit-grid conversations."""

    num_train: int = Field(gt=0)
    """Conversations in every cache."""
    num_test: int = Field(gt=0)
    """Held-out questions, about other handwritten digits."""
    seed: int = 1
    """Decides the split of the handwritten digits and all conversations."""
    max_turns: int = Field(default=2, gt=0)
    """Questions per training conversation, at most."""


class StudyModel(StrictConfig):
    """How a model learns before the study uses it."""

    name: Name = Field(pattern=NAME)
    """Folder name."""
    steps: int = Field(gt=0)
    """Supervised steps."""
    vision_steps: int = Field(default=400, gt=0)
    """Steps of the vision encoder before them."""


class StudyTeacher(StudyModel):
    """A teacher of the demo's recipe: the more steps, the stronger."""


class StudyStudent(StudyModel):
    """An untouched student of one of the demo's shapes."""

    family: Family
    """Architecture and tokenizer; qwen2-vl has the teacher's tokenizer, the others have their own."""
    patch_size: int | None = Field(default=None, gt=0)
    """Pixels along a patch of the image; the shape's own by default. Larger patches are fewer image tokens."""
    max_digits: int | None = Field(default=None, gt=0)
    """Handwritten digits that it has seen; all training digits by default."""


class EqualFlops(StrictConfig):
    """Scale an arm's steps until it has spent as many FLOPs as another."""

    to: Name
    """Arm with the budget."""
    like: Name
    """Arm of the same method and settings, whose FLOPs at the unscaled steps are known."""
    budget: Budget = "total"
    """student: what the students' training spent; total: the teacher's capture too."""


class Arm(StrictConfig):
    """One way to train."""

    name: Name = Field(pattern=NAME)
    """Name in the results."""
    method: ArmMethod
    """untouched trains nothing."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the study's `train`, nested alike."""
    cache: Name = "full"
    """Which of the study's `caches` it reads."""
    data_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the training conversations, the first ones."""
    shuffled_targets: bool = False
    """Give each sample the teacher's targets of another one: what is then learned comes from no teacher."""
    scored_stages: tuple[Stage, ...] = ()
    """Stages before the last whose students are scored too, as `NAME@STAGE`."""
    equal_flops: EqualFlops | None = None
    """By default the steps are those of `train`."""

    @property
    def depends_on_teacher(self) -> bool:
        """Whether another teacher gives another result."""
        return self.method not in TEACHERLESS or self.equal_flops is not None

    @property
    def result_names(self) -> tuple[str, ...]:
        """Arms that it adds to the results."""
        return (self.name, *(f"{self.name}@{stage}" for stage in self.scored_stages))


class Pair(StrictConfig):
    """A student with a teacher."""

    student: Name
    teacher: Name


class GridPart(StrictConfig):
    """Arms, pairs and seeds that are run in all combinations."""

    arms: tuple[Name, ...] = Field(min_length=1)
    pairs: tuple[Pair, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    """Each decides the order of samples and what the Recalibrator starts from."""


class Claim(StrictConfig):
    """One arm is said to be better than another."""

    text: str
    """The claim in words."""
    paper: str = ""
    """The paper's own figures; empty for a question that the paper does not ask."""
    better: Name
    """Arm that is said to be more accurate."""
    worse: Name
    """Arm that it is compared with, seed by seed, over the pairs that have both."""
    better_teacher: Name | None = None
    """Teacher of the first arm, where the claim compares teachers."""
    worse_teacher: Name | None = None
    """Teacher of the second."""
    equal_within: float | None = Field(default=None, gt=0)
    """Says that the two are equal, within so much accuracy, rather than that one is better."""


class StudyEvaluation(StrictConfig):
    """Held-out scoring."""

    batch_size: int = Field(default=64, gt=0)
    """Samples per generated batch."""
    max_new_tokens: int = Field(default=64, gt=0)
    """Longest answer in tokens."""


class StudyConfig(StrictConfig):
    """A grid of runs over arms, seeds and pairs of teacher and student."""

    output_dir: OutputFolder
    """Folder for data, models, caches and runs."""
    report_dir: OutputFolder = "docs/study"
    """Folder for results.parquet and figures; the page is the file of the same name beside it."""
    data: StudyData
    teachers: tuple[StudyTeacher, ...] = Field(min_length=1)
    students: tuple[StudyStudent, ...] = Field(min_length=1)
    caches: dict[Name, TargetsConfig] = Field(default_factory=lambda: {"full": TargetsConfig()})
    """What is stored, by name: each is built for the teachers whose runs read it."""
    samples_per_shard: int = Field(default=256, gt=0)
    """Of all caches."""
    build: BuildConfig = BuildConfig()
    """How caches are built."""
    train: TrainConfig
    """Settings of every run; arms override them, and the seed is the run's own."""
    arms: tuple[Arm, ...] = Field(min_length=1)
    grid: tuple[GridPart, ...] = Field(min_length=1)
    """Runs in the order in which they are made."""
    claims: tuple[Claim, ...] = ()
    """Comparisons that the report answers."""
    evaluation: StudyEvaluation = StudyEvaluation()
    workers: int = Field(default=1, gt=0)
    """Runs at a time, each in a process of its own."""
    threads: int = Field(default=1, gt=0)
    """Threads of each."""

    @model_validator(mode="after")
    def _names_exist(self) -> "StudyConfig":
        arms, teachers, students = (_names(part) for part in (self.arms, self.teachers, self.students))
        for arm in self.arms:
            _require(arm.cache, self.caches, what=f"cache of arm {arm.name}")
            equal = arm.equal_flops
            for name in () if equal is None else (equal.to, equal.like):
                _require(name, arms, what=f"arm in equal_flops of {arm.name}")
                if self.arm(name).equal_flops is not None:
                    raise ValueError(f"equal_flops of arm {arm.name} names {name}, whose own steps are scaled")
            try:
                self.train_config(arm, seed=0)
            except ValidationError as error:
                raise ValueError(f"train of arm {arm.name}: {error}") from error
        for part in self.grid:
            for name in part.arms:
                _require(name, arms, what="arm in grid")
            for pair in part.pairs:
                _require(pair.student, students, what="student in grid")
                _require(pair.teacher, teachers, what="teacher in grid")
        known = [name for arm in self.arms for name in arm.result_names]
        for claim in self.claims:
            for name in (claim.better, claim.worse):
                _require(name, known, what="arm in claims")
            for teacher in (claim.better_teacher, claim.worse_teacher):
                _require(teacher or self.teachers[0].name, teachers, what="teacher in claims")
        return self

    def arm(self, name: str) -> Arm:
        """Return the arm of a name."""
        return next(arm for arm in self.arms if arm.name == name)

    def train_config(self, arm: Arm, *, seed: int) -> TrainConfig:
        """Return the training settings of an arm, its steps not yet scaled."""
        values = merged(self.train.model_dump(mode="json"), arm.train)
        if arm.data_fraction < 1:
            share = {"max_samples": max(1, round(arm.data_fraction * self.data.num_train))}
            values = merged(values, dict.fromkeys(STAGES, share))
        return TrainConfig.model_validate(values | {"seed": seed})


def load_study(path: str | Path) -> StudyConfig:
    """Read a study file.

    Raises:
        ConfigError: The file is missing, is not YAML, or has unknown, missing, ill-typed or double keys.
    """
    values, text = read_yaml(path, kind="study file")
    try:
        return StudyConfig.model_validate(values)
    except ValidationError as error:
        faults = describe_faults(error, model=StudyConfig, text=text)
        raise ConfigError(f"{path} is no valid study file:\n{faults}") from error


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return nested values with some of them replaced."""
    both = {
        key: merged(values[key], change) if isinstance(change, dict) and isinstance(values.get(key), dict) else change
        for key, change in changes.items()
    }
    return {**values, **both}


def _names(parts: Sequence[Arm | StudyModel]) -> list[str]:
    names = [part.name for part in parts]
    if len(set(names)) != len(names):
        raise ValueError(f"names must differ, found {', '.join(names)}")
    return names


def _require(name: str, known: Sequence[str] | dict[str, Any], *, what: str) -> None:
    if name not in known:
        raise ValueError(f"{what}: no {name!r}, known are {', '.join(known)}")
