"""Runs lmms-eval on one suite: command line, process, what it prints, its time limit."""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from launch.processes import FATE_SHARED, LAUNCHER_VARIABLES
from launch.secrets import redact
from launch.suites.environment import JUDGE_VARIABLES, Suite, SuiteEnvironment
from launch.suites.plugin import MODEL
from launch.suites.results import SuiteFigure, read_figures
from teacher_cache.config import Dtype
from teacher_cache.errors import GenrecalError

logger = logging.getLogger(__name__)

GRACE_S = 30.0
"""Between SIGTERM and SIGKILL."""
READER_TIMEOUT_S = 10.0
"""For the rest of what a process has printed; one that left its group may hold the pipe open for ever."""
PROGRESS_INTERVAL_S = 30.0
"""Between two lines about progress where standard error is no terminal."""
STUDENT = "student"
OUTPUT = "results"


class SuiteFailed(GenrecalError):
    """A suite that came to no result."""


@dataclass(frozen=True, kw_only=True)
class SuiteSettings:
    """How suites run."""

    dtype: Dtype
    batch_size: int
    limit: int | None
    """Only so many questions of each task; None for all."""
    timeout_s: float
    """For one suite and one student."""
    without_judge: bool = False
    """Keep the key of the judge model from suites that ask one."""


@dataclass(frozen=True, kw_only=True)
class SuiteStudent:
    """A student and its name in the record."""

    name: str
    model: str
    """As it was asked for: a directory, or a model of the hub."""
    path: Path
    """Where its files are."""
    trust_remote_code: bool = False


def suite_command(
    suite: Suite, *, student: SuiteStudent, environment: SuiteEnvironment, settings: SuiteSettings
) -> list[str]:
    """Return the command line, for a working directory in which `student` is the student.

    lmms-eval splits some arguments at commas and equal signs: no path of a user may stand in those.
    """
    model = f"pretrained={STUDENT},dtype={settings.dtype}"
    if student.trust_remote_code:
        model += ",trust_remote_code=True"
    command = [
        *(str(environment.python.absolute()), "-m", "lmms_eval"),
        *("--model", MODEL, "--model_args", model),
        *("--tasks", suite.task, "--batch_size", str(settings.batch_size)),
        *("--output_path", OUTPUT, "--log_samples"),
    ]
    if environment.include is not None:
        command += ["--include_path", str(environment.include.resolve())]
    if settings.limit is not None:
        command += ["--limit", str(settings.limit)]
    return command


def run_suite(
    suite: Suite,
    *,
    student: SuiteStudent,
    work_dir: Path,
    log: Path,
    environment: SuiteEnvironment,
    settings: SuiteSettings,
) -> tuple[SuiteFigure, ...]:
    """Run one suite on a student and return its figures.

    Args:
        suite: What to run.
        student: Who answers.
        work_dir: Made anew; holds the files of lmms-eval, with every answer, afterwards.
        log: File that takes all that lmms-eval prints, secrets hidden.
        environment: Where lmms-eval is.
        settings: How to run it.

    Raises:
        SuiteFailed: lmms-eval failed, left no results, or took too long.
        DataError: Its results cannot be read.
    """
    if work_dir.exists():
        shutil.rmtree(work_dir)
    work_dir.mkdir(parents=True)
    (work_dir / STUDENT).symlink_to(student.path.resolve(), target_is_directory=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = suite_command(suite, student=student, environment=environment, settings=settings)
    variables = _child_environment(without_judge=settings.without_judge)
    code = run_logged(command, cwd=work_dir, log=log, timeout_s=settings.timeout_s, environment=variables)
    if code is None:
        raise SuiteFailed(f"suite {suite.task} took longer than {settings.timeout_s / 3600:g} h; see {log}")
    # lmms-eval ends with 0 where an exception ended its evaluation: the file it writes tells
    files = sorted((work_dir / OUTPUT).glob("**/*_results.json"))
    if code != 0 or len(files) != 1:
        raise SuiteFailed(f"suite {suite.task}: lmms-eval left no results (exit code {code}); see {log}: {_last(log)}")
    return read_figures(files[0], suite=suite)


def run_logged(
    command: Sequence[str], *, cwd: Path, log: Path, timeout_s: float, environment: Mapping[str, str]
) -> int | None:
    """Run a command, pass on what it prints to a file and to standard error; return its exit code, None if too late."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    reader = threading.Thread(target=_pass_on, args=(process.stdout, log), daemon=True)
    reader.start()
    try:
        return process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)
        reader.join(timeout=READER_TIMEOUT_S)


def _child_environment(*, without_judge: bool) -> dict[str, str]:
    """Return what lmms-eval inherits: not the place among processes of a launcher, which it would wait for."""
    hidden = set(LAUNCHER_VARIABLES)
    if without_judge:
        hidden |= {name for names in JUDGE_VARIABLES.values() for name in names}
    passed = {name: value for name, value in os.environ.items() if name not in hidden}
    return {"PYTHONUNBUFFERED": "1"} | passed | {FATE_SHARED: str(os.getpid())}


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and all that it started."""
    for number, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=wait_s)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _pass_on(output: IO[bytes], log: Path) -> None:
    """Copy lines to the log and to standard error; bars, which rewrite their line, only to standard error."""
    shown = -PROGRESS_INTERVAL_S
    with output, log.open("w", encoding="utf-8") as file:
        for line, ended in _pieces(output):
            text = redact(line.decode(errors="replace"))
            if ended:
                file.write(f"{text}\n")
                file.flush()
            if ended or sys.stderr.isatty():
                print(text, end="\n" if ended else "\r", file=sys.stderr, flush=True)
            elif time.monotonic() - shown >= PROGRESS_INTERVAL_S:
                shown = time.monotonic()
                print(text, file=sys.stderr, flush=True)


def _pieces(output: IO[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Yield what a process prints, cut at ends of lines (True) and at carriage returns (False)."""
    rest = b""
    while chunk := os.read(output.fileno(), 65536):
        *pieces, rest = re.split(rb"(?<=\n)|(?<=\r)(?!\n)", rest + chunk)
        for piece in pieces:
            if piece != b"\r":  # bars begin with it too
                yield piece.rstrip(b"\r\n"), piece.endswith(b"\n")
    if rest:
        yield rest, True


def _last(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    return " / ".join(lines[-3:])[-500:]
