"""`genrecal eval --suite`: students through published benchmarks, one process of lmms-eval per student and suite."""

import argparse
import logging
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

from launch.arguments import ArgumentParser
from launch.console import print_table
from launch.logs import setup_logging
from launch.provenance import record_path, recorded
from launch.run_config import RunConfig
from launch.suites.environment import (
    DEFAULT_FOLDER,
    Suite,
    SuiteEnvironment,
    open_environment,
    require_judge,
)
from launch.suites.harness import SuiteFailed, SuiteSettings, SuiteStudent, run_suite
from launch.suites.identity import folder_digest, judge_of, suite_identity
from launch.suites.results import RECORD, SuiteFailure, SuiteRecord, SuiteResult, read_record, write_record
from launch.suites.students import find_students, output_folder, require_free_names, source_of
from teacher_cache.config import Dtype
from teacher_cache.errors import ConfigError, DataError, GenrecalError

logger = logging.getLogger(__name__)

WORK_FOLDER = "suites"
"""In the folder of a run: what lmms-eval writes, by student and suite."""
RERUN = f"`genrecal eval` of this file, with the options in {record_path(Path(RECORD))},"


class SuitesIncomplete(GenrecalError):
    """Some suites came to no result; the others are kept, and the same command tries only these again."""

    code = "suites-incomplete"
    exit_code = 3


def add_suite_arguments(parser: ArgumentParser) -> None:
    """Take what a run of suites needs."""
    group = parser.add_argument_group("published benchmarks")
    group.add_argument(
        "--suite",
        metavar="NAME,...",
        help="run these benchmarks of lmms-eval instead, by the name of a paper (mmmu,mmvet) or of a task",
    )
    group.add_argument(
        "--student",
        metavar="DIR",
        help="exported student; with CONFIG also the name of one of the run, by default all, untouched and trained",
    )
    group.add_argument(
        "--output", type=Path, metavar="DIR", help=f"folder for {RECORD}; by default the run in which the student lies"
    )
    group.add_argument(
        "--suite-env",
        type=Path,
        default=DEFAULT_FOLDER,
        metavar="VENV",
        help=f"environment that launch/suites/install.sh made; by default {DEFAULT_FOLDER}",
    )
    group.add_argument("--include-path", type=Path, metavar="DIR", help="folder with tasks of your own")
    group.add_argument("--limit", type=_positive, metavar="N", help="only so many questions of each task, for a try")
    group.add_argument(
        "--without-judge",
        action="store_true",
        help="run suites that ask a judge model, but ask none; what rules cannot score counts as wrong or guessed",
    )
    group.add_argument(
        "--dtype", choices=get_args(Dtype), default="bfloat16", help="element type in which students compute"
    )
    group.add_argument(
        "--batch-size", type=_positive, default=8, metavar="N", help="questions answered together; by default 8"
    )
    group.add_argument(
        "--suite-hours", type=_hours, default=24.0, metavar="H", help="longest time of one suite; by default 24"
    )


def require_suite(parser: ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse, without `--suite`, the options that would say nothing.

    Raises:
        ConfigError: One is given.
    """
    for action in parser.options():
        if getattr(options, action.dest, action.default) != action.default:
            parser.error(f"{action.option_strings[0]} goes with --suite")


def evaluate_suites(options: argparse.Namespace, config: RunConfig | None) -> int:
    """Run suites on students, skip what is complete, print all figures; go on after a suite that fails.

    Raises:
        ConfigError: A suite, student or environment is not there, a judge cannot be asked, two students have one
            name, or a try would take the place of a full result.
        SuitesIncomplete: Some suites came to no result.
    """
    environment = open_environment(options.suite_env, include=options.include_path)
    names = dict.fromkeys(name for name in options.suite.split(",") if name)
    suites = list({suite.task: suite for suite in map(environment.suite, names)}.values())
    if not suites:
        raise ConfigError("--suite names no benchmark: give some, as `--suite mmmu,mmvet`")
    if not options.without_judge:
        require_judge(suites)
    students = find_students(options.student, config)
    output_dir = output_folder(options.output, config, students)
    path = output_dir / RECORD
    require_free_names(students, record=read_record(path), output_dir=output_dir)
    if options.limit is not None:
        _keep_full_results(path, suites=suites, students=students)
    setup_logging(output_dir / "logs" / "suites.log")
    settings = SuiteSettings(
        dtype=options.dtype,
        batch_size=options.batch_size,
        limit=options.limit,
        timeout_s=3600 * options.suite_hours,
        without_judge=options.without_judge,
    )
    for suite in suites:
        _announce(suite, settings=settings)
    tasks = None if environment.include is None else folder_digest(environment.include)
    with recorded(lambda: [path], config=config, rerun=RERUN) as run:
        outcomes = []
        for student in students:
            weights = folder_digest(student.path)
            for suite in suites:
                identity = suite_identity(
                    suite, student=weights, tasks=tasks, lmms_eval=environment.version, settings=settings
                )
                outcomes.append(
                    _evaluate(
                        suite,
                        student=student,
                        identity=identity,
                        output_dir=output_dir,
                        environment=environment,
                        settings=settings,
                    )
                )
        run.counts = any(outcome is not None for outcome in outcomes)
    _print(read_record(path), suites=suites, students=students)
    if failed := [outcome for outcome in outcomes if isinstance(outcome, SuiteFailure)]:
        raise SuitesIncomplete(
            f"{len(failed)} of {len(outcomes)} came to no result; the same command tries only these again:\n"
            + "\n".join(f"{one.student}, {one.suite}: {one.reason}" for one in failed)
        )
    return 0


def _evaluate(
    suite: Suite,
    *,
    student: SuiteStudent,
    identity: str,
    output_dir: Path,
    environment: SuiteEnvironment,
    settings: SuiteSettings,
) -> SuiteResult | SuiteFailure | None:
    """Run a suite on a student and record the outcome; None where it is complete already."""
    path = output_dir / RECORD
    record = read_record(path)
    known = record.result(student.name, suite.task)
    if known is not None and known.identity == identity:
        logger.info("%s, %s: complete", student.name, suite.task)
        return None
    if known is not None:  # figures of other weights or settings go with their answers, whatever comes of this run
        write_record(record.without(student.name, suite.task), path)
    logger.info("%s, %s: running", student.name, suite.task)
    log = output_dir / "logs" / f"suite-{student.name}-{suite.task}.log"
    start = time.monotonic()
    outcome: SuiteResult | SuiteFailure
    try:
        figures = run_suite(
            suite,
            student=student,
            work_dir=output_dir / WORK_FOLDER / student.name / suite.task,
            log=log,
            environment=environment,
            settings=settings,
        )
    except (SuiteFailed, DataError) as error:
        logger.error("%s, %s: %s", student.name, suite.task, error)
        outcome = SuiteFailure(
            student=student.name,
            source=source_of(student, output_dir=output_dir),
            suite=suite.task,
            identity=identity,
            reason=str(error),
            log=str(log),
        )
    else:
        outcome = SuiteResult(
            student=student.name,
            source=source_of(student, output_dir=output_dir),
            suite=suite.task,
            included=suite.included,
            identity=identity,
            lmms_eval=environment.version,
            dtype=settings.dtype,
            limit=settings.limit,
            judge=judge_of(suite, settings=settings),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - start, 1),
            figures=figures,
        )
    write_record(read_record(path).with_outcome(outcome), path)
    return outcome


def _keep_full_results(path: Path, *, suites: Sequence[Suite], students: Sequence[SuiteStudent]) -> None:
    """Refuse to put a try in the place of a result of all questions.

    Raises:
        ConfigError: There is such a result.
    """
    record = read_record(path)
    for student in students:
        for suite in suites:
            known = record.result(student.name, suite.task)
            if known is not None and known.limit is None:
                raise ConfigError(
                    f"{path} has all questions of {suite.task} for {student.name}, and --limit would replace them: "
                    "give the try a folder of its own with --output"
                )


def _announce(suite: Suite, *, settings: SuiteSettings) -> None:
    known = f" ({suite.known.name})" if suite.known else ""
    judge = judge_of(suite, settings=settings)
    asks = f"; answers go to the judge model {judge}" if judge else ""
    logger.info("suite %s%s%s", suite.task, known, asks)


def _print(record: SuiteRecord, *, suites: Sequence[Suite], students: Sequence[SuiteStudent]) -> None:
    rows = [["student", "task", "metric", "value", "stderr", "samples"]]
    for student in students:
        for suite in suites:
            result = record.result(student.name, suite.task)
            for figure in result.figures if result else ():
                stderr = "-" if figure.stderr is None else f"{figure.stderr:.4g}"
                samples = "-" if figure.num_samples is None else str(figure.num_samples)
                rows.append([student.name, figure.task, figure.metric, f"{figure.value:.4g}", stderr, samples])
    print_table(rows)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _hours(text: str) -> float:
    hours = float(text)
    if not hours > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return hours
