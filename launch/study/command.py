"""`genrecal study`: make what the runs share, do the runs, keep the results, tell them."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.arguments import ArgumentParser
from launch.logs import setup_logging
from launch.study.config import StudyConfig, load_study
from launch.study.grid import Cell, cell_folder, plan_cells
from launch.study.inputs import Inputs, check_same_inputs, make_data, missing_models
from launch.study.pool import Pool, Task
from launch.study.records import load_teacher, throw_away_weights
from launch.study.results import RESULT, Row, read_rows, write_table
from teacher_cache.errors import GenrecalError
from teacher_cache.progress import progress

logger = logging.getLogger(__name__)

FAILURE = "failure.json"
RESULTS = "results.parquet"


class StudyIncomplete(GenrecalError):
    """Runs of a study failed; the others are done, and a new start tries these again."""

    code = "study-incomplete"
    exit_code = 3


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that ended without result."""

    name: str
    error: str


def study_command(argv: Sequence[str]) -> int:
    """Run or continue a study, or write its report."""
    options = study_parser().parse(argv)
    config = load_study(options.config)
    if options.report:
        from launch.study.report import write_report

        print(write_report(config, config_path=options.config, failures=read_failures(config)))
        return 0
    setup_logging(Path(config.output_dir) / "logs" / "study.log")
    failures = run_study(config)
    if failures:
        raise StudyIncomplete(
            f"{len(failures)} of {len(plan_cells(config))} runs failed, first {failures[0].name}: {failures[0].error}. "
            f"Run again to try them again; what they said is in {config.output_dir}/logs"
        )
    return 0


def study_parser() -> ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = ArgumentParser(
        "study",
        description="Run the arms, seeds and pairs of a study file, or go on with them, and keep their results.",
        exit_codes="0 done, 2 wrong usage or study file, 3 runs failed (run it again)",
        example="study.yaml --report",
    )
    parser.add_argument("config", metavar="CONFIG", help="study file, such as examples/study.yaml")
    parser.add_argument("--report", action="store_true", help="write tables and figures of the results so far")
    return parser


def run_study(config: StudyConfig) -> list[Failure]:
    """Do everything that is not done yet and return the runs that failed.

    Raises:
        ConfigError: The study's folder was made with other data or models.
        GenrecalError: A part that the runs share could not be made.
    """
    check_same_inputs(config)
    log_dir = Path(config.output_dir) / "logs"
    with Pool(workers=config.workers, threads=config.threads, log_dir=log_dir) as pool:
        make_inputs(config, pool=pool)
        _run_cells(config, pool=pool)
    return read_failures(config)


def make_inputs(config: StudyConfig, *, pool: Pool) -> None:
    """Make data, models, caches and the teachers' own scores."""
    inputs = Inputs(config=config)
    make_data(config)
    make_model, build_cache = "launch.study.inputs:make_model", "launch.study.inputs:build_cache"
    _run_all(pool, [_task(name, make_model, config, name) for name in missing_models(config)])
    caches = [names for names in inputs.caches() if not inputs.capture_file(*names).exists()]
    for teacher, name in caches:  # each brings a Ray of its own
        _run_all(pool, [_task(f"cache {teacher}-{name}", build_cache, config, teacher, name)])
    unscored = [one.name for one in config.teachers if not inputs.scores_file(one.name).exists()]
    score_teacher = "launch.study.runs:score_teacher"
    _run_all(pool, [_task(f"scores of {name}", score_teacher, config, name) for name in unscored])


def _run_cells(config: StudyConfig, *, pool: Pool) -> None:
    cells = plan_cells(config)
    waiting = []
    for cell in cells:
        if _is_done(config, cell):
            throw_away_weights(cell_folder(config, cell))
        else:
            waiting.append(cell)
    save_results(config)
    with progress(total=len(cells), initial=len(cells) - len(waiting), unit="run", description="study") as bar:
        # those that scale their steps to the FLOPs of others come after all others
        for scaled in (False, True):
            part = [cell for cell in waiting if (cell.arm.equal_flops is not None) is scaled]
            named = {cell.name: cell for cell in part}
            tasks = [_task(cell.name, "launch.study.runs:run_cell", config, cell) for cell in part]
            for outcome in pool.run(tasks):
                _keep_failure(config, named[outcome.task.name], error=outcome.error)
                save_results(config)
                bar.update(1)
                logger.info("%s: %.0f s", outcome.task.name, outcome.seconds)


def save_results(config: StudyConfig) -> None:
    """Write the results of all finished runs of the study file, in its order."""
    rows = teacher_rows(config)
    for cell in plan_cells(config):
        if _is_done(config, cell):
            rows += read_rows(cell_folder(config, cell) / RESULT)
    write_table(rows, Path(config.report_dir) / RESULTS)


def teacher_rows(config: StudyConfig) -> list[Row]:
    """Return one row per teacher that is scored: what its students are to reach."""
    inputs, rows = Inputs(config=config), []
    for teacher in config.teachers:
        if inputs.scores_file(teacher.name).exists():
            scores, _ = load_teacher(inputs.scores_file(teacher.name))
            rows.append(Row(arm="teacher", teacher=teacher.name, **asdict(scores)))
    return rows


def read_failures(config: StudyConfig) -> list[Failure]:
    """Return the runs that failed when they were last tried."""
    paths = [cell_folder(config, cell) / FAILURE for cell in plan_cells(config)]
    return [Failure(**json.loads(path.read_text())) for path in paths if path.exists()]


def _is_done(config: StudyConfig, cell: Cell) -> bool:
    return (cell_folder(config, cell) / RESULT).exists()


def _task(name: str, target: str, *arguments: object) -> Task:
    return Task(name=name, target=target, arguments=arguments)


def _run_all(pool: Pool, tasks: Sequence[Task]) -> None:
    """Do tasks that everything else needs.

    Raises:
        GenrecalError: One of them failed.
    """
    for outcome in pool.run(tasks):
        if outcome.error is not None:
            raise GenrecalError(f"{outcome.task.name} could not be made: {outcome.error}")
        logger.info("%s: made in %.0f s", outcome.task.name, outcome.seconds)


def _keep_failure(config: StudyConfig, cell: Cell, *, error: str | None) -> None:
    """Remember a run that failed; forget it when a later try went well."""
    path = cell_folder(config, cell) / FAILURE
    if error is None:
        path.unlink(missing_ok=True)
        return
    logger.warning("%s failed: %s", cell.name, error)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"name": cell.name, "error": error}) + "\n")
