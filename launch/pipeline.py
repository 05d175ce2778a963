"""`genrecal run`: cache -> train every student -> evaluate -> report, skipping what is complete.

Each step decides for itself, from what lies in the run's folder, whether it has anything left to do; a
run that was killed anywhere is continued by starting it again.
"""

import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

from launch import arguments
from launch.accounting import ACCOUNTING, account
from launch.arguments import ArgumentParser
from launch.clusters.marks import mark_cache
from launch.logs import setup_logging
from launch.processes import run_process, trainer_environment
from launch.provenance import cache_output, recorded
from launch.run_config import RunConfig, parse_run, write_run_config
from launch.run_students import RunStudent
from launch.train_commands import evaluate_run
from teacher_cache.answers_config import AnswersConfig
from teacher_cache.durable_files import replace_file
from teacher_cache.errors import CacheIncomplete, ConfigError, GenrecalError

logger = logging.getLogger(__name__)


class TrainingFailed(GenrecalError):
    """A student whose training failed; the others of its run can go on."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One part of a run, by the name under which its duration is kept."""

    name: str
    action: Callable[[], bool]
    """Returns False when everything was there already."""


def run_parser() -> ArgumentParser:
    """Return the parser of `run`; what it does not know overrides fields of the run file."""
    return arguments.run_parser(
        "run",
        description="Do everything that a run file describes: answers, cache, training, evaluation and report. What is "
        "complete and of the same content is left alone: a run that ended anywhere is continued by running it again.",
        exit_codes="0 done, 1 failed, 3 incomplete (run it again), 4 something that is there holds other content",
    )


def run_command(argv: Sequence[str]) -> int:
    """Run everything that a run file describes."""
    _, config = parse_run(run_parser(), argv)
    output_dir = Path(config.output_dir)
    setup_logging(output_dir / "logs" / "run.log")
    run_pipeline(config)
    logger.info("results: %s", output_dir / "results.json")
    return 0


def run_pipeline(*configs: RunConfig) -> None:
    """Build, train, evaluate and report; several run files must share folder and cache, and get one report.

    A student whose training fails does not keep the others from being trained, scored and reported.

    Raises:
        ConfigError: The run files differ in ``output_dir``, ``cache`` or ``answers``.
        TrainingFailed: Students could not be trained; everything else is done.
        GenrecalError: Another step failed; its own message says how to go on.
    """
    first = configs[0]
    if any(_shared(config) != _shared(first) for config in configs):
        raise ConfigError(
            "run files that run together must have the same `output_dir`, `cache` and `answers`; run them singly"
        )
    output_dir = Path(first.output_dir)
    steps = [] if first.answers is None else [Step(name="answers", action=partial(write_answers, first, first.answers))]
    steps.append(Step(name="cache", action=partial(build, first)))
    steps += [step for config in configs for step in _student_steps(config)]
    if any(config.evaluation is not None for config in configs):
        steps.append(Step(name="report", action=partial(report, first)))
    took: dict[str, float] = {}
    failed: list[TrainingFailed] = []
    for number, step in enumerate(steps, start=1):
        logger.info("step %d of %d: %s%s", number, len(steps), step.name, _left(steps[number - 1 :], took))
        try:
            with timed(output_dir, step=step.name) as timing:
                timing.counts = step.action()
        except TrainingFailed as error:
            logger.error("%s", error)
            failed.append(error)
        if timing.counts:
            took[step.name] = timing.seconds
    if took or not (output_dir / ACCOUNTING).exists():
        account(configs)
    if failed:
        raise _joined(failed)


def _joined(failed: Sequence[TrainingFailed]) -> TrainingFailed:
    """Return one error for all: where running again gets any of them further, its exit code says so."""
    error = TrainingFailed("; ".join(map(str, failed)))
    codes = [one.exit_code for one in failed]
    error.exit_code = CacheIncomplete.exit_code if CacheIncomplete.exit_code in codes else codes[0]
    return error


def _left(steps: Sequence[Step], took: Mapping[str, float]) -> str:
    """Return how long the steps will take if each takes as long as those of its kind took, where any did."""
    kinds: dict[str, list[float]] = {}
    for name, seconds in took.items():
        kinds.setdefault(name.partition(" ")[0], []).append(seconds)
    known = [kinds[kind] for step in steps if (kind := step.name.partition(" ")[0]) in kinds]
    if not known:
        return ""
    seconds = round(sum(sum(found) / len(found) for found in known))
    bound = "about" if len(known) == len(steps) else "at least"
    return f" ({bound} {timedelta(seconds=seconds)} left at the pace of the steps before)"


def _student_steps(config: RunConfig) -> list[Step]:
    names = "+".join(student.name for student in config.students)
    run_file = Path(config.output_dir) / "run-files" / f"{config.students[0].name}.yaml"
    write_run_config(config, run_file, header=f"Everything that decided the run of {names}; loads to the same run.")
    steps = [
        Step(name=f"train {student.name}", action=partial(train, config, student, run_file=run_file))
        for student in config.students
    ]
    if config.evaluation is not None:
        steps.append(Step(name=f"evaluate {names}", action=partial(evaluate, config)))
    return steps


def _shared(config: RunConfig) -> tuple[object, ...]:
    return config.output_dir, config.cache, config.answers


def write_answers(config: RunConfig, answers: AnswersConfig) -> bool:
    """Have the teacher replace very short answers; return whether any part was missing.

    Raises:
        DataIncomplete: Some parts could not be written.
    """
    from teacher_cache import answers as job

    log_dir = Path(config.output_dir) / "logs"
    with recorded(lambda: [Path(config.cache.data.path)], config=config) as recording:
        recording.counts = job.write_answers(config.cache, answers=answers, log_dir=log_dir).parts_written > 0
    return recording.counts


def build(config: RunConfig) -> bool:
    """Build the teacher cache, or find it complete; return whether any shard was missing.

    Raises:
        CacheIncomplete: Some shards could not be built.
    """
    from teacher_cache.build import build_cache

    with recorded(lambda: [cache_output(config)], config=config) as recording:
        recording.counts = build_cache(config.cache, log_dir=Path(config.output_dir) / "logs").shards_built > 0
    mark_cache(config)
    return recording.counts


def train(config: RunConfig, student: RunStudent, *, run_file: Path) -> bool:
    """Train one student in processes of its own, so that this one stays free of torch.distributed.

    Raises:
        TrainingFailed: It did.
    """
    output_dir = Path(config.output_dir)
    marker = output_dir / "training" / student.name / "COMPLETE"
    key = _training_key(config, student)
    if marker.exists() and marker.read_text() == key and (output_dir / "students" / student.name).is_dir():
        logger.info("%s is trained already", student.name)
        return False
    command = [sys.executable, "-m", "launch.cli", "train", str(run_file), "--student", student.name]
    code = run_process(command, environment=trainer_environment(num_processes=config.train.num_processes))
    if code != 0:
        raise _training_failed(student, code, log=output_dir / "logs" / f"train-{student.name}.log")
    marker.write_text(key)
    return True


def _training_failed(student: RunStudent, code: int, *, log: Path) -> TrainingFailed:
    how = f"failed with exit code {code}"
    if code - 128 in set(signal.Signals):
        how = f"was ended by {signal.Signals(code - 128).name}" + " (out of memory?)" * (code - 128 == signal.SIGKILL)
    error = TrainingFailed(f"training {student.name} {how}; see {log}. Run again to resume")
    error.exit_code = code
    return error


def _training_key(config: RunConfig, student: RunStudent) -> str:
    """Return what tells that nothing has changed since a training was finished.

    Where it differs, the trainer looks closer: it compares each part by name, and the samples' contents.
    """
    from distill.identity import student_files_digest
    from distill.student import resolve_model
    from teacher_cache import open_cache
    from teacher_cache.manifest import fingerprint
    from teacher_cache.teacher_checkpoint import digest_files, weight_files

    base, data = resolve_model(student.model, revision=student.revision), Path(config.cache.data.path).stat()
    return fingerprint(
        {
            "train": student.settings(config.train).model_dump(mode="json"),
            "student": student.alone().model_dump(mode="json"),
            "weights": digest_files(weight_files(base)),
            "files": student_files_digest(base),
            "data": [config.cache.data.model_dump(mode="json"), data.st_size, data.st_mtime_ns],
            "cache": open_cache(config.cache.uri).fingerprint,
        }
    )


def evaluate(config: RunConfig) -> bool:
    """Score what is not scored yet."""
    return evaluate_run(config)


def report(config: RunConfig) -> bool:
    """Write the HTML report, unless it is newer than everything it shows."""
    from launch.report import write_report

    output_dir = Path(config.output_dir)
    path = output_dir / "report.html"
    sources = [
        *output_dir.glob("evaluation/*.json"),
        *output_dir.glob("suites.json"),
        *output_dir.glob("training/*/*/metrics.jsonl"),
    ]
    stale = not path.exists() or any(source.stat().st_mtime > path.stat().st_mtime for source in sources)
    with recorded(lambda: [path], config=config) as recording:
        recording.counts = stale
        if stale:
            write_report(output_dir)
    logger.info("report: %s", path)
    return stale


@dataclass(kw_only=True)
class Timing:
    """Whether a step's time is kept, and what it was."""

    counts: bool = True
    seconds: float = 0.0


@contextmanager
def timed(output_dir: Path, *, step: str) -> Iterator[Timing]:
    """Add the time that a step takes to timings.json: a step continued in a second run counts both."""
    path = output_dir / "timings.json"
    timing = Timing()
    start = time.monotonic()
    try:
        yield timing
    finally:
        timing.seconds = time.monotonic() - start
        if timing.counts:
            _add_seconds(path, step=step, seconds=timing.seconds)


def _add_seconds(path: Path, *, step: str, seconds: float) -> None:
    rows = json.loads(path.read_text()) if path.exists() else []
    row = next((row for row in rows if row["step"] == step), None)
    if row is None:
        row = {"step": step, "seconds": 0.0}
        rows.append(row)
    row["seconds"] = round(row["seconds"] + seconds, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(rows, indent=2) + "\n").encode())
