"""Wait until other jobs of a run have left their durable marks: ``python -m launch.clusters.wait``."""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

from launch.clusters.endings import endings
from launch.clusters.jobs import run_jobs
from launch.run_config import load_run_config
from teacher_cache.errors import GenrecalError

INTERVAL_S = 15.0


class JobsMissing(GenrecalError):
    """The jobs before this one have not become complete in time."""

    code = "jobs-missing"
    exit_code = 3


class JobsEnded(GenrecalError):
    """A job before this one has ended without its marks: waiting again is useless until it is submitted again."""

    code = "jobs-ended"
    exit_code = 4


def wait_for_jobs(
    run_file: str,
    labels: Sequence[str],
    *,
    limit_s: float,
    ended: Callable[[], Mapping[str, str]] = dict,
    interval_s: float = INTERVAL_S,
) -> None:
    """Return once the jobs with these labels (`cache`, `train NAME`) are complete.

    Args:
        run_file: The run that they belong to.
        labels: Which jobs.
        limit_s: Seconds to wait at most.
        ended: Says by label of jobs that have ended why they will leave no marks any more.
        interval_s: Seconds between two looks.

    Raises:
        JobsEnded: One of them has ended without its marks.
        JobsMissing: The time is up.
    """
    config = load_run_config(run_file)
    end = time.monotonic() + limit_s
    while True:
        reasons = ended()  # asked first: a job may end between the two looks
        missing = [job.label for job in run_jobs(config) if job.label in labels and not job.complete]
        if not missing:
            return
        for label in missing:
            if label in reasons:
                raise JobsEnded(f"{label} of {run_file} will not become complete: {reasons[label]}; submit again")
        if time.monotonic() >= end:
            raise JobsMissing(f"{', '.join(missing)} of {run_file} not complete after {limit_s:.0f} s; submit again")
        time.sleep(interval_s)


def main(argv: Sequence[str] | None = None) -> int:
    """Wait for jobs; exit 3 when the time is up, 4 when one has ended without its marks."""
    parser = argparse.ArgumentParser(prog="python -m launch.clusters.wait", allow_abbrev=False)
    parser.add_argument("run_file")
    parser.add_argument("--job", action="append", required=True, help="cache, or train NAME; may be repeated")
    parser.add_argument("--limit-s", type=float, required=True, help="seconds to wait at most")
    parser.add_argument(
        "--since",
        type=datetime.fromisoformat,
        required=True,
        help="time of this submission; older endings do not count",
    )
    options = parser.parse_args(argv)
    try:
        wait_for_jobs(options.run_file, options.job, limit_s=options.limit_s, ended=lambda: _reasons(options))
    except GenrecalError as error:
        print(f"error [{error.code}]: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _reasons(options: argparse.Namespace) -> dict[str, str]:
    found = endings(load_run_config(options.run_file), since=options.since)
    return {label: f"it has ended with exit code {code}" for label, code in found.items()}


if __name__ == "__main__":
    # the first process of a container ignores the signal otherwise, and its pod keeps its GPUs until it is killed
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
