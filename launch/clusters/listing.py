"""`genrecal jobs`: what was submitted from here, and how it stands."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.arguments import ArgumentParser
from launch.clusters.jobs import Job, run_jobs
from launch.clusters.journal import JOURNAL, Submission, read
from launch.clusters.states import scheduler_states
from launch.console import print_json, print_table
from launch.run_config import load_run_config
from teacher_cache.errors import ConfigError

LEVELS = 3
"""Folders between the one that is looked into and a run's `submit`."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One submitted job and how it stands."""

    submission: Submission
    output_dir: str
    state: str
    """What the scheduler says, in its own words, or unknown."""
    complete: bool | None
    """Whether the job has left its durable marks; None when its run file is gone."""


def jobs_parser() -> ArgumentParser:
    """Return the parser of `jobs`."""
    parser = ArgumentParser(
        "jobs",
        description="List the jobs that were submitted from the runs under a folder, the last submission of each.",
        exit_codes="0 listed, 2 there is no such folder",
    )
    parser.add_argument("folder", nargs="?", default=".", metavar="DIR", help="folder of a run, or of several")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def jobs_command(argv: Sequence[str]) -> int:
    """Print each job's id, what its scheduler says of it, and whether it has left its durable marks."""
    options = jobs_parser().parse(argv)
    folder = Path(options.folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: name the `output_dir` of a run, or a folder of several")
    standings = list_jobs(folder)
    if options.json:
        print_json([asdict(standing) for standing in standings])
    elif standings:
        print_table([("JOB", "ID", "ON", "STATE", "MARKS", "RUN"), *(_row(standing) for standing in standings)])
    else:
        print(f"no jobs were submitted from runs in {options.folder}")
    return 0


def list_jobs(folder: Path) -> list[Standing]:
    """Return the last submission of each job of the runs under a folder, oldest first."""
    found = [path.parent for level in range(LEVELS) for path in folder.glob(f"{'*/' * level}submit/{JOURNAL}")]
    standings: list[Standing] = []
    for submit in sorted(found):
        last = {(entry.scheduler, entry.key): entry for entry in read(submit)}
        states = scheduler_states(list(last.values()))
        standings += [
            Standing(
                submission=entry,
                output_dir=str(submit.parent),
                state=states.get(entry.job_id, "unknown"),
                complete=_complete(entry),
            )
            for entry in last.values()
        ]
    return standings


def _complete(entry: Submission) -> bool | None:
    try:
        jobs: list[Job] = run_jobs(load_run_config(entry.run_file))
    except ConfigError:
        return None
    return next((job.complete for job in jobs if job.key == entry.key), None)


def _row(standing: Standing) -> tuple[str, ...]:
    entry = standing.submission
    marks = {True: "complete", False: "incomplete", None: "unknown"}[standing.complete]
    return (entry.label, entry.job_id, entry.scheduler, standing.state, marks, standing.output_dir)
