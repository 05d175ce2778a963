"""One job of a run inside a Ray cluster, as `genrecal submit` starts it: ``python -m launch.clusters.ray_driver``.

It waits for the jobs before it, does its work, and does it again where that makes sense: Ray itself repeats no job.
"""

import argparse
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

from launch.clusters.endings import endings, leave_ending
from launch.clusters.jobs import TrainShape, train_shape
from launch.clusters.node_ranks import REFUSALS, train_arguments
from launch.clusters.wait import wait_for_jobs
from launch.run_config import RunConfig, load_run_config
from teacher_cache.errors import GenrecalError

logger = logging.getLogger(__name__)

FAILED = ("FAILED", "STOPPED")
MARKS_LATE_S = 120.0
"""Seconds that a shared file system may take to show a node what a job on another has left."""
CLUSTER_ENDS_S = 60.0
"""Seconds in which a cluster that is being ended, and so makes a step fail, ends this driver too."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job to its end; the exit codes are those of `genrecal`."""
    options = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        return _run_once(options) if options.since is not None else _run(options)
    except GenrecalError as error:
        print(f"error [{error.code}]: {error}", file=sys.stderr)
        return error.exit_code


def _run_once(options: argparse.Namespace) -> int:
    """Run a job that its operator starts over however it has ended: what has ended for good ends at once."""
    label = options.kind if options.student is None else f"{options.kind} {options.student}"
    code = endings(load_run_config(options.run_file), since=options.since).get(label)
    if code is not None:
        print(f"{label} has ended with exit code {code} before: submit it again", file=sys.stderr)
    else:
        code = _run(options)
        if code not in (0, *REFUSALS):
            time.sleep(CLUSTER_ENDS_S)
    if code != 0:
        # again, where it was left before: jobs that were submitted since then wait for it too
        leave_ending(options.run_file, label, exit_code=code)
    return code


def _run(options: argparse.Namespace) -> int:
    config = load_run_config(options.run_file)
    # Ray's ids come in the order of the labels
    before = Predecessors(dict(zip(options.after_id, options.after, strict=False)))
    if options.after:
        wait_for_jobs(options.run_file, options.after, limit_s=options.wait_s, ended=before.ended, interval_s=5.0)
    for step in _steps(options.kind, config, options):
        code = attempt(step, attempts=options.attempts)
        if code != 0:
            return code
    return 0


def attempt(step: Callable[[], int], *, attempts: int) -> int:
    """Run a step until it is done or refused; return its last exit code."""
    code = 3
    for number in range(1, attempts + 1):
        code = step()
        if code in (0, 1, *REFUSALS):
            return code
        logger.info("attempt %d of %d ended with exit code %d", number, attempts, code)
    return code


class Predecessors:
    """What Ray says of the jobs before this one."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        """Take the label of each job by Ray's id."""
        self._labels = labels
        self._succeeded: dict[str, float] = {}
        self._silent = False

    def ended(self) -> dict[str, str]:
        """Return why jobs that have ended will leave no marks any more, by label; nothing while Ray does not answer."""
        if not self._labels:
            return {}
        from ray.exceptions import RayError
        from ray.job_submission import JobSubmissionClient

        try:
            jobs = JobSubmissionClient(os.environ.get("RAY_ADDRESS")).list_jobs()
        except (OSError, RuntimeError, RayError) as error:
            if not self._silent:
                logger.warning("Ray does not say how the jobs before this one stand, and is asked again: %s", error)
            self._silent = True
            return {}
        self._silent = False
        by_id = {job.submission_id: job for job in jobs}
        own = {job_id: by_id[job_id] for job_id in self._labels if job_id in by_id}
        now = time.monotonic()
        self._succeeded = {
            job_id: self._succeeded.get(job_id, now) for job_id, job in own.items() if job.status.value == "SUCCEEDED"
        }
        late = {job_id for job_id, since in self._succeeded.items() if now - since >= MARKS_LATE_S}
        return {
            self._labels[job_id]: f"{job_id} is {job.status.value}: {job.message}"
            for job_id, job in own.items()
            if job.status.value in FAILED or job_id in late
        }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.clusters.ray_driver", allow_abbrev=False)
    parser.add_argument("kind", choices=("cache", "train", "report"))
    parser.add_argument("run_file")
    parser.add_argument("--student", help="which student to train")
    parser.add_argument("--after", action="append", default=[], help="job to wait for: cache, or train NAME")
    parser.add_argument("--after-id", action="append", default=[], help="Ray's id of such a job")
    parser.add_argument("--wait-s", type=float, default=0.0, help="seconds to wait for them at most")
    parser.add_argument("--attempts", type=int, default=1, help="times that an interrupted step is started")
    parser.add_argument(
        "--since",
        type=datetime.fromisoformat,
        help="time of the submission: once ended since then, it does not start over",
    )
    return parser


def _steps(kind: str, config: RunConfig, options: argparse.Namespace) -> list[Callable[[], int]]:
    if kind == "cache":
        commands = [["cache", "build", options.run_file]]
        if config.answers is not None:
            commands.insert(0, ["cache", "answers", options.run_file])
        return [partial(_genrecal, command) for command in commands]
    if kind == "train":
        shape = train_shape(config, config.cluster.ray.train, where="cluster.ray.train")
        return [lambda: _train(config, options, shape)]
    return [lambda: _report(config, options.run_file)]


def _genrecal(arguments: Sequence[str]) -> int:
    code = subprocess.run([sys.executable, "-m", "launch.cli", *arguments], check=False).returncode
    return code if code >= 0 else 128 - code


def _train(config: RunConfig, options: argparse.Namespace, shape: TrainShape) -> int:
    from launch.clusters.ray_ranks import run_on_nodes

    resources = config.cluster.ray.train
    return run_on_nodes(
        train_arguments(options.run_file, student=options.student),
        shape=shape,
        cpus_per_node=resources.cpus_per_node,
        gpus_per_node=shape.gpus_per_node,
        log_dir=Path(config.output_dir) / "logs" / f"train-{options.student}-ranks",
    )


def _report(config: RunConfig, run_file: str) -> int:
    from launch.clusters.ray_ranks import run_on_nodes

    resources = config.cluster.ray.report
    return run_on_nodes(
        [sys.executable, "-m", "launch.clusters.report_job", run_file],
        shape=None,
        cpus_per_node=resources.cpus_per_node,
        gpus_per_node=resources.gpus_per_node,
        log_dir=Path(config.output_dir) / "logs",
    )


if __name__ == "__main__":
    sys.exit(main())
