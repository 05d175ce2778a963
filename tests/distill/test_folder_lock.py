"""A student's folder is held by one training at a time, as long as that lives."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from distill.folder_lock import TrainingBusy, locked_folder
from distill.processes import Processes
from distill.reshard import reshard
from distill.trainer import _alone, train_student
from teacher_cache.config import CacheConfig, DataConfig, TeacherConfig
from tests.distill.small_runs import student_config, train_config

HOLD = """
import os, pathlib, sys, time
from distill.folder_lock import locked_folder
with locked_folder(pathlib.Path(sys.argv[1])):
    if sys.argv[2] == "forks" and os.fork() == 0:
        time.sleep(600)
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def another_process(folder: Path, *, forks: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Have another process hold a folder; it is alone in a group of its own."""
    command = [sys.executable, "-c", HOLD, str(folder), "forks" if forks else ""]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_second_process_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    folder = tmp_path / "training" / "tiny"
    with another_process(folder) as other:
        for _ in range(2):
            with (
                pytest.raises(TrainingBusy, match=rf"tiny is in use by process {other.pid} on \S+: wait"),
                locked_folder(folder),
            ):
                raise AssertionError
    with locked_folder(folder):
        assert str(os.getpid()) in (folder / ".lock").read_text()
    with locked_folder(folder):
        pass


def test_a_killed_process_gives_the_folder_back_though_its_workers_live(tmp_path: Path) -> None:
    with another_process(tmp_path, forks=True) as other:
        other.kill()
        other.wait()
        with locked_folder(tmp_path):
            pass


def test_a_training_and_a_reshard_leave_a_folder_alone_that_another_training_holds(tmp_path: Path) -> None:
    (tmp_path / "training/tiny/align/checkpoints/step-1").mkdir(parents=True)
    (tmp_path / "training/tiny/align/checkpoints/step-1/COMMIT.json").touch()
    cache = CacheConfig(uri="none", teacher=TeacherConfig(model="none"), data=DataConfig(path="none"))
    before = sorted(tmp_path.rglob("*"))
    with another_process(tmp_path / "training" / "tiny"):
        with pytest.raises(TrainingBusy):
            train_student(cache=cache, student=student_config(Path("none")), train=train_config(), output_dir=tmp_path)
        with pytest.raises(TrainingBusy):
            reshard(tmp_path / "training" / "tiny" / "align")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "training" / "tiny" / ".lock"])


def test_all_processes_end_where_the_first_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = Processes(rank=1, world_size=2, device=torch.device("cpu"))
    monkeypatch.setattr(Processes, "sum", lambda _, values: [values[0] + 1])
    with pytest.raises(TrainingBusy, match="the first process says by whom"), _alone(tmp_path, second):
        raise AssertionError


def test_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with locked_folder(tmp_path):
        assert "has no locks" in caplog.text
