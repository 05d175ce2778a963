"""Students with settings of their own, and a matrix of settings, as a run takes them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.config import StudentConfig, TrainConfig
from launch.cli import main
from launch.run_config import RunConfig, load_run_config, validated
from teacher_cache.errors import ConfigError


def config_of(**changes: Any) -> RunConfig:
    values = {
        "output_dir": "runs/x",
        "cache": {"uri": "c", "teacher": {"model": "t"}, "data": {"path": "d.parquet"}},
        "students": [{"name": "a", "model": "m"}],
        "train": {"seed": 7, "distill": {"learning_rate": 0.5, "max_steps": 3}},
    }
    return validated(values | changes, source="test")


def test_a_students_settings_replace_the_runs_and_no_others() -> None:
    own = {"distill": {"learning_rate": 0.25}, "stages": ["distill"]}
    config = config_of(students=[{"name": "a", "model": "m"}, {"name": "b", "model": "m", "train": own}])
    assert config.student("a").settings(config.train) == config.train
    settings = config.student("b").settings(config.train)
    assert settings.distill.learning_rate == 0.25
    assert settings.stages == ("distill",)
    distill = config.train.distill.model_copy(update={"learning_rate": 0.25})
    assert settings == config.train.model_copy(update={"distill": distill, "stages": ("distill",)})


def test_a_student_alone_is_what_training_takes() -> None:
    config = config_of(students=[{"name": "a", "model": "m", "train": {"seed": 1}}])
    alone = config.student(None).alone()
    assert type(alone) is StudentConfig
    assert alone == StudentConfig(name="a", model="m")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"distil": {}}, "distil: unknown key, did you mean 'distill'?"),
        ({"distill": {"learning_rat": 1}}, "distill.learning_rat: unknown key, did you mean 'distill.learning_rate'?"),
        ({"distill": {"learning_rate": -1}}, "distill.learning_rate: Input should be greater than 0"),
        ({"num_processes": 2}, "`train.num_processes` is the same for all students"),
        ({"backend": "torch"}, "`train.backend` is the same for all students"),
    ],
)
def test_wrong_settings_of_a_student_are_named(own: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config_of(students=[{"name": "small", "model": "m", "train": own}])
    assert message in str(refused.value)
    assert "small" in str(refused.value)


def test_a_matrix_makes_a_student_per_combination() -> None:
    students = [{"name": "a", "model": "m"}, {"name": "b", "model": "n", "train": {"distill": {"warmup_steps": 5}}}]
    config = config_of(students=students, matrix={"distill.learning_rate": [1e-4, 3e-5], "seed": [0, 1]})
    assert [student.name for student in config.students] == [
        f"{name}-learning_rate-{rate}-seed-{seed}"
        for name in ("a", "b")
        for rate in ("0.0001", "3e-05")
        for seed in (0, 1)
    ]
    settings = {student.name: student.settings(config.train) for student in config.students}
    found = settings["b-learning_rate-3e-05-seed-1"]
    assert (found.distill.learning_rate, found.seed, found.distill.warmup_steps) == (3e-5, 1, 5)
    assert found.distill.max_steps == 3
    assert settings["a-learning_rate-0.0001-seed-0"].distill.warmup_steps == 0
    assert len({settings.model_dump_json() for settings in settings.values()}) == len(settings)
    assert config.matrix == {}


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ({"distill.learning_rate": []}, "matrix must give a list of values"),
        ({"distill.learning_rate": 1}, "matrix must give a list of values"),
        ({"distill.lr": [1, 2]}, "distill.lr: unknown key"),
        ({"seed": [1, 1]}, "different names"),
        ({"num_processes": [1, 2]}, "the same for all students"),
    ],
)
def test_a_wrong_matrix_is_refused(matrix: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(matrix=matrix)


def test_show_spells_the_matrix_out_and_loads_to_the_same_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = tmp_path / "run.yaml"
    values = config_of().model_dump(mode="json") | {"matrix": {"seed": [1, 2]}}
    run_file.write_text(yaml.safe_dump(values))
    config = load_run_config(run_file)
    assert main(["config", "show", str(run_file)]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert [student["name"] for student in shown["students"]] == ["a-seed-1", "a-seed-2"]
    assert [student["train"] for student in shown["students"]] == [{"seed": 1}, {"seed": 2}]
    assert RunConfig.model_validate(shown) == config
    assert config.train == TrainConfig.model_validate(shown["train"])
