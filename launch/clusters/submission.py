"""What all ways of submitting share: where files go, the run file as it was submitted, what became of each job."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.clusters.jobs import Job
from launch.run_config import RunConfig, write_run_config
from teacher_cache.manifest import fingerprint

KEY_DIGITS = 10


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one job."""

    job: Job
    job_id: str | None
    """None where nothing was submitted."""
    state: str


def submit_folder(config: RunConfig) -> Path:
    """Return the folder of everything about submitted jobs."""
    return Path(config.output_dir).resolve() / "submit"


def frozen_run_file(config: RunConfig) -> Path:
    """Return where the run file is kept as it was submitted: later edits reach no job that waits."""
    digest = fingerprint(config.model_dump(mode="json", exclude={"cluster"}))[:KEY_DIGITS]
    return submit_folder(config) / "run-files" / f"{digest}.yaml"


def write_frozen_run_file(config: RunConfig) -> None:
    """Write that file."""
    write_run_config(config, frozen_run_file(config), header="The run file as submitted, with overrides.")


def now() -> str:
    """Return the time as the journal has it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def outcome_rows(outcomes: Sequence[Outcome]) -> list[tuple[str, str, str]]:
    """Return what is printed about a submission: job, its id, what became of it."""
    return [(outcome.job.label, outcome.job_id or "", outcome.state) for outcome in outcomes]
