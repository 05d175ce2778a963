"""Students of a run file: settings of their own over the run's, and a matrix that makes many of one."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from distill.config import StudentConfig, TrainConfig

SHARED = ("num_processes", "backend")
"""Settings of training that decide how jobs are laid out, so that all students of a run have the same."""


class RunStudent(StudentConfig):
    """One student of a run."""

    train: dict[str, Any] = Field(default_factory=dict)
    """Settings of `train` that are others for this student, as {distill: {learning_rate: 3e-5}}; `num_processes` and
    `backend` are the same for all."""

    def settings(self, train: TrainConfig) -> TrainConfig:
        """Return the settings of this student's training.

        Raises:
            ValidationError: Its own ones are no settings.
        """
        return TrainConfig.model_validate(merged(train.model_dump(mode="json"), self.train)) if self.train else train

    def alone(self) -> StudentConfig:
        """Return the student without its settings."""
        return StudentConfig.model_validate(self.model_dump(mode="json", exclude={"train"}))


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values with some replaced."""
    result = dict(values)
    for name, change in changes.items():
        old = result.get(name)
        result[name] = merged(old, change) if isinstance(change, Mapping) and isinstance(old, Mapping) else change
    return result


def expand_matrix(students: Sequence[Any], matrix: Mapping[str, Sequence[Any]]) -> list[Any]:
    """Return each student once per combination of settings, named after its values: `small-learning_rate-3e-05`.

    Args:
        students: As in the run file.
        matrix: Values by the dotted name of a setting below `train`.
    """
    if not all(isinstance(student, Mapping) and "name" in student for student in students):
        return list(students)  # wrong in itself, which validation says better
    expanded = []
    for student, values in itertools.product(students, itertools.product(*matrix.values())):
        own, name = dict(student.get("train") or {}), str(student["name"])
        for setting, value in zip(matrix, values, strict=True):
            *groups, leaf = setting.split(".")
            change: Any = value
            for part in (leaf, *reversed(groups)):
                change = {part: change}
            own = merged(own, change)
            name += f"-{leaf}-{_word(value)}"
        expanded.append({**student, "name": name, "train": own})
    return expanded


def _word(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "_" for letter in text)
