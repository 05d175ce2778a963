"""One job of a run inside a Ray cluster, as `genrecal submit` starts it: ``python -m launch.clusters.ray_driver``.

It waits for the jobs before it, does its work, and does it again where that makes sense: Ray itself repeats no job.
"""

import argparse
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from launch.clusters.jobs import TrainShape, train_shape
from launch.clusters.node_ranks import REFUSALS, train_arguments
from launch.clusters.wait import wait_for_jobs
from launch.run_config import RunConfig, load_run_config
from teacher_cache.errors import GenrecalError

logger = logging.getLogger(__name__)

ENDED = ("FAILED", "STOPPED")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job to its end; the exit codes are those of `genrecal`."""
    options = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    config = load_run_config(options.run_file)
    try:
        if options.after:
            wait_for_jobs(
                options.run_file,
                options.after,
                limit_s=options.wait_s,
                failed=lambda: _ended(options.after_id),
                interval_s=5.0,
            )
        for step in _steps(options.kind, config, options):
            code = attempt(step, attempts=options.attempts)
            if code != 0:
                return code
    except GenrecalError as error:
        print(f"error [{error.code}]: {error}", file=sys.stderr)
        return error.exit_code
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.clusters.ray_driver", allow_abbrev=False)
    parser.add_argument("kind", choices=("cache", "train", "report"))
    parser.add_argument("run_file")
    parser.add_argument("--student", help="which student to train")
    parser.add_argument("--after", action="append", default=[], help="job to wait for: cache, or train NAME")
    parser.add_argument("--after-id", action="append", default=[], help="Ray's id of such a job")
    parser.add_argument("--wait-s", type=float, default=0.0, help="seconds to wait for them at most")
    parser.add_argument("--attempts", type=int, default=1, help="times that an interrupted step is started")
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
        [train_arguments(options.run_file, student=options.student)],
        shape=shape,
        cpus_per_node=resources.cpus_per_node,
        gpus_per_node=resources.gpus_per_node,
        log_dir=Path(config.output_dir) / "logs" / f"train-{options.student}-ranks",
    )


def _report(config: RunConfig, run_file: str) -> int:
    from launch.clusters.ray_ranks import run_on_nodes

    resources = config.cluster.ray.report
    genrecal = [sys.executable, "-m", "launch.cli"]
    return run_on_nodes(
        [[*genrecal, "eval", run_file], [*genrecal, "report", config.output_dir]],
        shape=None,
        cpus_per_node=resources.cpus_per_node,
        gpus_per_node=resources.gpus_per_node,
        log_dir=Path(config.output_dir) / "logs",
    )


def _ended(job_ids: Sequence[str]) -> str | None:
    """Return which of these jobs of the cluster has ended without success."""
    from ray.job_submission import JobSubmissionClient

    if not job_ids:
        return None
    client = JobSubmissionClient(os.environ.get("RAY_ADDRESS"))
    for job in client.list_jobs():
        if job.submission_id in job_ids and job.status.value in ENDED:
            return f"{job.submission_id} is {job.status.value}: {job.message}"
    return None


if __name__ == "__main__":
    sys.exit(main())
