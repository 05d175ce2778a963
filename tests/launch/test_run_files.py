"""What is refused in run and study files, and in which words."""

from collections.abc import Callable
from pathlib import Path

import pytest

from launch.cli import main
from launch.config_yaml import read_yaml
from launch.run_config import load_run_config
from launch.study.config import load_study
from teacher_cache.errors import ConfigError

RUN = """\
output_dir: runs/x
cache:
  uri: s3://bucket/cache
  teacher: {model: teacher}
  data: {path: train.parquet}
students:
  - {name: small, model: student}
"""
STUDY = Path(__file__).parents[2] / "examples" / "study-small.yaml"
LOADERS = {"run": (load_run_config, RUN), "study": (load_study, STUDY.read_text())}


def fault(load: Callable[[Path], object], text: str, folder: Path) -> str:
    path = folder / "file.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    return str(caught.value)


@pytest.mark.parametrize("kind", LOADERS)
def test_a_key_that_stands_twice_is_refused_with_both_lines(kind: str, tmp_path: Path) -> None:
    load, text = LOADERS[kind]
    last = len(text.splitlines()) + 1
    first = next(line for line, words in enumerate(text.splitlines(), start=1) if words.startswith("output_dir:"))
    message = fault(load, f"{text}output_dir: b\n", tmp_path)
    assert f"line {last}: 'output_dir' stands in line {first} already" in message


@pytest.mark.parametrize("kind", LOADERS)
def test_a_tag_that_would_run_code_is_refused(kind: str, tmp_path: Path) -> None:
    load, text = LOADERS[kind]
    attack = f"{text}more: !!python/object/apply:os.mkdir [{tmp_path}/made]\n"
    assert "is not YAML: could not determine a constructor" in fault(load, attack, tmp_path)
    assert not (tmp_path / "made").exists()


def test_a_key_that_stands_twice_is_refused_at_any_depth(tmp_path: Path) -> None:
    text = RUN.replace("model: student}", "model: student, train: {distill: {max_steps: 1, max_steps: 2}}}")
    assert "line 7: 'max_steps' stands in line 7 already" in fault(load_run_config, text, tmp_path)


def test_a_merged_key_may_be_overruled(tmp_path: Path) -> None:
    path = tmp_path / "merged.yaml"
    path.write_text("c: {<<: &a {<<: &b {k: 1, z: 2}, k: 2}, m: 3}\nd: {<<: [*a, *b], z: 4}\n")
    values, _ = read_yaml(path, kind="run file")
    assert values == {"c": {"k": 2, "z": 2, "m": 3}, "d": {"k": 2, "z": 4}}


@pytest.mark.parametrize("uri", ["s3://bucket/x", "file:///tmp/x"])
@pytest.mark.parametrize("kind", LOADERS)
def test_outputs_are_written_to_a_file_system(kind: str, uri: str, tmp_path: Path) -> None:
    load, text = LOADERS[kind]
    lines = [f"output_dir: {uri}" if line.startswith("output_dir:") else line for line in text.splitlines()]
    message = fault(load, "\n".join(lines), tmp_path)
    assert "output_dir: " in message
    assert f"'{uri}' is a URI, but outputs are written to a folder of a file system" in message


def test_a_folder_of_outputs_in_an_override_is_held_to_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    assert main(["config", "show", str(path), "--output-dir", "gs://bucket/x"]) == 2
    assert "caches alone may be in an object store" in capsys.readouterr().err


def test_a_fault_of_an_entry_is_no_fault_of_its_list(tmp_path: Path) -> None:
    message = fault(load_run_config, RUN.replace("name: small", "name: small, methd: kd"), tmp_path)
    assert "line 7: students.0.methd: unknown key, did you mean 'students.0.method'?" in message
    assert "at least 1 item" not in message


def test_a_list_without_entries_is_too_short(tmp_path: Path) -> None:
    message = fault(load_run_config, RUN.partition("students:")[0] + "students: []\n", tmp_path)
    assert "students: Tuple should have at least 1 item" in message


def test_a_faulty_study_file_is_told_with_lines_and_suggestions(tmp_path: Path) -> None:
    text = STUDY.read_text() + "workrs: 2\n"
    assert f"line {len(text.splitlines())}: workrs: unknown key, did you mean 'workers'?" in fault(
        load_study, text, tmp_path
    )


def test_a_misspelt_option_is_told_before_a_missing_run_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(tmp_path / "nope.yaml"), "--sute"]) == 2
    assert "did you mean '--suite'?" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "nope.yaml"), "--students.0.name", "x"]) == 2
    assert "nope.yaml: No such file or directory" in capsys.readouterr().err
