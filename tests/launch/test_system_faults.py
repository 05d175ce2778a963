"""What users meet often: folders that cannot be written, readers that leave, models that are not there. In one line."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from distill.student import resolve_model
from launch import train_commands
from launch.cli import main
from teacher_cache.errors import ConfigError


@pytest.fixture(autouse=True)
def closed_logs() -> Iterator[None]:
    """Close the log files that commands opened in this process."""
    yield
    logging.captureWarnings(capture=False)
    for handler in [found for found in logging.getLogger().handlers if isinstance(found, logging.FileHandler)]:
        logging.getLogger().removeHandler(handler)
        handler.close()


RUN = """\
output_dir: {folder}
cache:
  uri: {folder}/cache
  teacher: {{model: teacher}}
  data: {{path: train.parquet}}
students:
  - {{name: small, model: {model}}}
evaluation: {{data: held-out.parquet, score_teacher: false}}
"""


def write_run(tmp_path: Path, *, output_dir: Path, model: str = "student") -> str:
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(folder=output_dir, model=model))
    return str(path)


@pytest.mark.parametrize("command", ["run", "eval", "submit slurm"])
def test_a_folder_that_cannot_be_made_is_named_in_a_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    run_file = write_run(tmp_path, output_dir=tmp_path / "file" / "run")
    assert main([*command.split(), run_file]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"genrecal {command}: error [system]: {tmp_path}/file/run/")
    assert line.endswith(": Not a directory")


def test_the_log_file_has_the_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(config: object) -> None:
        raise OSError(28, "No space left on device", "there", None, "here")

    monkeypatch.setattr(train_commands, "evaluate_run", full)
    assert main(["eval", write_run(tmp_path, output_dir=tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "genrecal eval: error [system]: there -> here: No space left on device\n"
    assert "Traceback" in (tmp_path / "run" / "logs" / "eval.log").read_text()


@pytest.mark.parametrize("arguments", [["config", "schema"], []], ids=["schema", "overview"])
def test_a_reader_that_leaves_is_no_fault(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "launch.cli", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_pipe_of_our_own_that_breaks_is_a_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(config: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(train_commands, "evaluate_run", broken)
    assert main(["eval", write_run(tmp_path, output_dir=tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "genrecal eval: error [system]: Broken pipe\n"


def test_output_that_does_not_fit_is_a_fault() -> None:
    command = [sys.executable, "-m", "launch.cli", "config", "schema"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "genrecal config schema: error [system]: No space left on device"


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_student_that_is_not_there_is_an_error_of_the_run_file(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = write_run(tmp_path, output_dir=tmp_path / "run", model="./no/such/model")
    assert main([command, run_file]) == 2
    told = capsys.readouterr().err
    assert f"genrecal {command}: error [config]: no model at ./no/such/model: there is no such folder" in told
    assert "Traceback" not in told


@pytest.mark.parametrize("offline", [True, False])
def test_a_repository_that_cannot_be_had_says_how_to_get_it(offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("no route\nand much more")  # as a transport might

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(ConfigError) as caught:
        resolve_model("some/model", revision="abc")
    why = "HF_HUB_OFFLINE is set, so that nothing is fetched" if offline else "no route"
    assert f"in {huggingface_hub.constants.HF_HUB_CACHE}: {why}; correct the name or HF_HOME" in str(caught.value)
    assert str(caught.value).endswith("`hf download some/model --revision abc`")


def test_a_fetch_from_a_file_that_is_not_there_speaks_of_its_own_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "nope.parquet", tmp_path / "train.parquet"
    assert main(["data", "fetch", str(source), str(target), "--host", "images.example.org"]) == 2
    told = capsys.readouterr().err
    assert f"no data file at {source}: SOURCE is a .parquet or .jsonl file on this machine" in told
    assert "data.path" not in told
