"""How jobs of a run have ended for good without their marks, for those that wait where no scheduler tells them."""

import json
import logging
from datetime import UTC, datetime
from pathlib import Path

from launch.clusters.jobs import Job, run_jobs
from launch.run_config import RunConfig, load_run_config
from teacher_cache.durable_files import replace_file, sync_names_above
from teacher_cache.errors import GenrecalError

logger = logging.getLogger(__name__)


def leave_ending(run_file: str, label: str, *, exit_code: int) -> None:
    """Say of the job with this label that it has ended and will not start over, as far as the run's folder is there."""
    ending = {"exit_code": exit_code, "ended": datetime.now(UTC).isoformat()}
    try:
        config = load_run_config(run_file)
        (job,) = [job for job in run_jobs(config) if job.label == label]
        path = _path(config, job)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(ending).encode())
        sync_names_above(path)
    except (OSError, GenrecalError) as error:
        logger.warning("nobody learns that %s has ended with exit code %d: %s", label, exit_code, error)


def endings(config: RunConfig, *, since: datetime) -> dict[str, int]:
    """Return the exit code of each job, by label, that has ended for good since then."""
    found = {}
    for job in run_jobs(config):
        try:
            ending = json.loads(_path(config, job).read_text(encoding="utf-8"))
            if datetime.fromisoformat(ending["ended"]) >= since:
                found[job.label] = int(ending["exit_code"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def _path(config: RunConfig, job: Job) -> Path:
    return Path(config.output_dir) / "submit" / "marks" / f"{job.name}.ended"
