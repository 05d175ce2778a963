import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.cli import COMMANDS, main, usage
from launch.run_config import RunConfig, load_run_config, write_run_config
from teacher_cache.errors import ConfigError

MINIMAL = {
    "output_dir": "runs/x",
    "cache": {"uri": "runs/x/cache", "teacher": {"model": "teacher"}, "data": {"path": "train.parquet"}},
    "students": [{"name": "small", "model": "student"}],
}


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_help_needs_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys; from launch.cli import main; main(['--help']); import launch.run_config;"
        "sys.exit(sum(name in sys.modules for name in ('torch', 'ray', 'vllm', 'deepspeed', 'transformers', 'zarr')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == usage()


def test_every_command_is_importable() -> None:
    import importlib

    for command in COMMANDS.values():
        module, function = command.target.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_unknown_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "bild", "x.yaml"]) == 2
    assert "no command 'cache bild'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teachr": 1}, "teachr: Extra inputs are not permitted"),
        ({"students": []}, "students"),
        ({"students": [{"name": "a", "model": "m"}, {"name": "a", "model": "n"}]}, "different names"),
        ({"cache": {"uri": "c", "teacher": {"model": "t", "dtyp": "x"}, "data": {"path": "p"}}}, "cache.teacher.dtyp"),
        ({"train": {"align": {"learning_rate": -1}}}, "train.align.learning_rate"),
    ],
)
def test_faults_in_a_run_file_are_named_by_their_path(
    run_file: Path, change: dict[str, object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file.write_text(yaml.safe_dump(MINIMAL | change))
    assert main(["config", "show", str(run_file)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["- a list", "key: [unclosed", None])
def test_unreadable_run_files_are_config_errors(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_run_config(path)


def test_overrides_reach_nested_fields_and_students(run_file: Path) -> None:
    config = load_run_config(run_file, ["--cache.teacher.revision", "abc", "--students.0.max-length", "77"])
    assert config.cache.teacher.revision == "abc"
    assert config.student(None).max_length == 77


def test_show_prints_a_file_that_loads_to_the_same_run(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "show", str(run_file)]) == 0
    shown = RunConfig.model_validate(yaml.safe_load(capsys.readouterr().out))
    assert shown == load_run_config(run_file)
    write_run_config(shown, tmp_path / "copy.yaml", header="two\nlines")
    assert load_run_config(tmp_path / "copy.yaml") == shown


def test_schema_describes_every_field_of_the_run_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["additionalProperties"] is False
    for definition in schema["$defs"].values():
        for name, field in definition["properties"].items():
            assert "description" in field or "$ref" in field, name


def test_student_must_be_named_where_there_are_several(run_file: Path) -> None:
    several = MINIMAL | {"students": [{"name": "a", "model": "m"}, {"name": "b", "model": "n"}]}
    run_file.write_text(yaml.safe_dump(several))
    config = load_run_config(run_file)
    assert config.student("b").model == "n"
    with pytest.raises(ConfigError, match="choose one of a, b"):
        config.student(None)
