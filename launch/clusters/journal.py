"""The journal of submitted jobs: one JSON line per submission in output_dir/submit/jobs.jsonl."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

Scheduler = Literal["slurm", "ray", "kuberay"]
JOURNAL = "jobs.jsonl"


@dataclass(frozen=True, kw_only=True)
class Submission:
    """One job that was handed to a scheduler."""

    scheduler: Scheduler
    label: str
    """What it is: cache, train NAME or report."""
    key: str
    """Of the job; see `launch.clusters.jobs.Job`."""
    job_id: str
    """What the scheduler calls it."""
    run_file: str
    """The run file as it was submitted."""
    submitted: str
    """Time, ISO 8601."""
    where: Mapping[str, str] = field(default_factory=dict)
    """What else names it: a dashboard's address, a namespace, a place in a job array."""


def append(folder: Path, submission: Submission) -> None:
    """Add one submission to the journal in a folder, for good."""
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps(asdict(submission)).encode() + b"\n"
    handle = os.open(folder / JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(handle, line)
        os.fsync(handle)
    finally:
        os.close(handle)


def read(folder: Path) -> list[Submission]:
    """Return all submissions of a folder, the oldest first; a line that a crash cut off is left out."""
    path = folder / JOURNAL
    if not path.exists():
        return []
    submissions = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            submissions.append(Submission(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return submissions


def latest(folder: Path, *, scheduler: Scheduler, key: str) -> Submission | None:
    """Return the last submission of a job to a scheduler."""
    found = [entry for entry in read(folder) if entry.scheduler == scheduler and entry.key == key]
    return found[-1] if found else None
