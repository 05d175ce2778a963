"""The run file: one YAML with the cache, its students, their training and evaluation.

The file must be complete; any of its fields is then overridden by ``--dotted.name VALUE``. Relative
paths are relative to the working directory.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from distill.config import TrainConfig
from launch.arguments import ArgumentParser
from launch.clusters.config import ClusterConfig
from launch.config_faults import describe_faults
from launch.config_yaml import OutputFolder, read_yaml
from launch.overrides import apply_overrides
from launch.plan_config import PlanConfig
from launch.run_students import SHARED, RunStudent, expand_matrix
from launch.secrets import secret_fields
from teacher_cache.answers_config import AnswersConfig
from teacher_cache.config import CacheConfig, Dtype, StrictConfig
from teacher_cache.durable_files import replace_file
from teacher_cache.errors import ConfigError


class EvaluationConfig(StrictConfig):
    """Held-out scoring."""

    data: str
    """Parquet or JSON-lines file of held-out conversations; the last answer of each is the reference."""
    scorer: Literal["exact", "digits"] = "exact"
    """`exact` (normalised equality with the reference), or `digits` (the facts of the digit-grid demo)."""
    score_teacher: bool = True
    """Score the teacher too, and each student's agreement with it; this loads the teacher on one GPU."""
    dtype: Dtype = "float32"
    """Of the weights while a model is scored."""
    max_samples: int | None = Field(default=None, gt=0)
    """Score only the first so many; all by default."""
    batch_size: int = Field(default=64, gt=0)
    """Samples per generated batch."""
    max_new_tokens: int = Field(default=256, gt=0)
    """Longest answer in tokens."""


class RunConfig(StrictConfig):
    """A whole job: one cache, any number of students."""

    output_dir: OutputFolder
    """Folder for training state, students, evaluation and report."""
    cache: CacheConfig
    answers: AnswersConfig | None = None
    """Very short answers that the teacher replaces before the cache is built; by default the data is used as it is."""
    students: tuple[RunStudent, ...] = Field(min_length=1)
    """Students that train from the cache, one after the other."""
    matrix: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Each student is trained once per combination of these settings of `train`, as {distill.learning_rate: [1e-4,
    3e-5], seed: [0, 1]}; `config show` spells the students out."""
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig | None = None
    """Held-out scoring at the end of a run; none by default."""
    plan: PlanConfig = PlanConfig()
    """Statistics and assumptions of `genrecal cache plan`."""
    cluster: ClusterConfig = ClusterConfig()
    """Where `genrecal submit` sends the jobs of this run."""

    @model_validator(mode="before")
    @classmethod
    def _expanded(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not values.get("matrix"):
            return values
        matrix, students = values["matrix"], values.get("students")
        usable = isinstance(matrix, Mapping) and all(isinstance(found, list) and found for found in matrix.values())
        if not usable or not isinstance(students, list):
            raise ValueError("matrix must give a list of values for each setting, and students must be a list")
        return {**values, "students": expand_matrix(students, matrix), "matrix": {}}

    @model_validator(mode="after")
    def _valid_settings(self) -> "RunConfig":
        for student in self.students:
            if shared := [name for name in SHARED if name in student.train]:
                raise ValueError(f"student {student.name}: `train.{shared[0]}` is the same for all students of a run")
            try:
                student.settings(self.train)
            except ValidationError as error:
                faults = describe_faults(error, model=TrainConfig)
                raise ValueError(f"student {student.name} has wrong settings in `train`:\n{faults}") from error
        return self

    @model_validator(mode="after")
    def _unique_students(self) -> "RunConfig":
        names = [student.name for student in self.students]
        if len(set(names)) != len(names):
            raise ValueError(f"students must have different names, found {', '.join(names)}")
        return self

    def student(self, name: str | None) -> RunStudent:
        """Return the student called ``name``, or the only one when it is None.

        Raises:
            ConfigError: There is no such student, or several and no name.
        """
        if name is None and len(self.students) == 1:
            return self.students[0]
        for student in self.students:
            if student.name == name:
                return student
        names = ", ".join(student.name for student in self.students)
        raise ConfigError(f"no student {name!r} in the run file; choose one of {names} with --student")


def load_run_config(path: str | Path, overrides: Sequence[str] = (), *, options: Sequence[str] = ()) -> RunConfig:
    """Read a run file and apply dotted overrides.

    Args:
        path: The run file.
        overrides: `--dotted.name VALUE` and so on.
        options: The command's own options, for suggestions.

    Raises:
        ConfigError: The file is missing, is not YAML, or has unknown, missing, ill-typed or double keys.
    """
    apply_overrides({}, overrides, model=RunConfig, options=options)  # a misspelt option is told before a missing file
    values, text = read_yaml(path, kind="run file")
    if not isinstance(values, dict):
        raise ConfigError(
            f"run file {path} holds {type(values).__name__}; expected keys such as `cache` and `students`"
        )
    config = validated(values, source=str(path), text=text)
    if not overrides:
        return config
    changed = apply_overrides(values, overrides, model=RunConfig, options=options)
    return validated(changed, source=f"{path} with the overrides behind it")


def parse_run(parser: ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, RunConfig]:
    """Parse the arguments of a command about a run file; what its parser does not know overrides fields.

    Raises:
        ConfigError: An argument or the run file is wrong.
    """
    options, overrides = parser.parse_known_args(argv)
    names = [name for action in parser.options() for name in action.option_strings]
    return options, load_run_config(options.config, overrides, options=names)


def validated(values: dict[str, Any], *, source: str, text: str = "") -> RunConfig:
    """Check parsed values; every fault is named with its dotted path, and its line in ``text`` where that is given."""
    if secrets := list(secret_fields(values)):
        raise ConfigError(
            f"{source} holds a secret in {', '.join(secrets)}: run files are copied beside every output; put secrets "
            "into environment variables"
        )
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        faults = describe_faults(error, model=RunConfig, text=text)
        raise ConfigError(
            f"{source} is no valid run file:\n{faults}\n`genrecal config example` shows every field."
        ) from error


def write_run_config(config: RunConfig, path: Path, *, header: str = "") -> None:
    """Write a run file that loads to the same configuration, replacing the old one durably."""
    data = run_file_text(config, header=header).encode()
    if path.exists() and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, data)


def run_file_text(config: RunConfig, *, header: str = "") -> str:
    """Return a run file that loads to the same configuration."""
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    return comment + yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
