"""Submit the jobs of a run to a Ray cluster that runs already, through Ray's Jobs API.

Ids follow from what a job makes, so a job that runs is never started twice.
"""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.clusters.jobs import Job, run_jobs, train_shape
from launch.clusters.journal import Submission, append
from launch.clusters.submission import Outcome, frozen_run_file, now, submit_folder
from launch.run_config import RunConfig
from teacher_cache.errors import ConfigError, GenrecalError
from teacher_cache.ray_guard import cluster_exposure, require_private, token_exposure

ACTIVE = ("PENDING", "RUNNING")


@dataclass(frozen=True, kw_only=True)
class RayJob:
    """What is sent to Ray for one job."""

    submission_id: str
    entrypoint: str
    """Shell command, in which every value is quoted."""
    metadata: dict[str, str]


def plan_ray(config: RunConfig, jobs: Sequence[Job]) -> list[tuple[Job, RayJob]]:
    """Return what is submitted for the jobs that are not complete; none of them carries an environment.

    Raises:
        ConfigError: The training processes do not spread evenly over the nodes.
    """
    ray = config.cluster.ray
    train_shape(config, ray.train, where="cluster.ray.train")
    left = [job for job in jobs if not job.complete]
    planned = []
    for job in left:
        before = [other for other in left if _depends(job, other)]
        arguments = [ray.python, "-m", "launch.clusters.ray_driver", job.kind, str(frozen_run_file(config))]
        if job.student is not None:
            arguments += ["--student", job.student]
        for other in before:
            arguments += ["--after", other.label, "--after-id", other.name]
        if before:
            arguments += ["--wait-s", str(ray.wait_s)]
        arguments += ["--attempts", str(ray.max_attempts)]
        working_dir = str(Path.cwd()) if ray.working_dir is None else ray.working_dir
        steps = [f". {shlex.quote(ray.environment_file)}"] if ray.environment_file is not None else []
        steps += [f"cd {shlex.quote(working_dir)}", f"exec {shlex.join(arguments)}"]
        metadata = {"job": job.label, "run_file": str(frozen_run_file(config))}
        planned.append((job, RayJob(submission_id=job.name, entrypoint=" && ".join(steps), metadata=metadata)))
    return planned


def describe_ray(config: RunConfig) -> str:
    """Return what would be submitted, as YAML."""
    jobs = run_jobs(config)
    done = "".join(f"# complete already: {job.label}\n" for job in jobs if job.complete)
    documents = [
        {"submission_id": ray.submission_id, "entrypoint": ray.entrypoint, "metadata": ray.metadata}
        for _, ray in plan_ray(config, jobs)
    ]
    return done + yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True, width=2**31)


def submit_ray(config: RunConfig) -> list[Outcome]:
    """Submit what is neither complete nor under way; what failed before is forgotten by Ray first.

    Raises:
        ConfigError: The cluster asks for no token, and that was not allowed.
        GenrecalError: It does not answer.
    """
    jobs = run_jobs(config)
    outcomes = [Outcome(job=job, job_id=None, state="complete already") for job in jobs if job.complete]
    planned = plan_ray(config, jobs)
    if not planned:
        return outcomes
    address = dashboard_address(config.cluster.ray.address)
    client = connect(address, insecure=config.cache.build.insecure_ray)
    known = {job.submission_id: job.status.value for job in client.list_jobs()}
    for job, ray in planned:
        if known.get(ray.submission_id) in ACTIVE:
            outcomes.append(Outcome(job=job, job_id=ray.submission_id, state="under way already"))
            continue
        if ray.submission_id in known:
            client.delete_job(ray.submission_id)
        client.submit_job(entrypoint=ray.entrypoint, submission_id=ray.submission_id, metadata=ray.metadata)
        submission = Submission(
            scheduler="ray",
            label=job.label,
            key=job.key,
            job_id=ray.submission_id,
            run_file=str(frozen_run_file(config)),
            submitted=now(),
            where={"address": address},
        )
        append(submit_folder(config), submission)
        outcomes.append(Outcome(job=job, job_id=ray.submission_id, state="submitted"))
    return outcomes


def dashboard_address(configured: str | None) -> str:
    """Return where the cluster's dashboard is.

    Raises:
        ConfigError: Nothing says where, or it is no http address.
    """
    address = configured or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"the Ray cluster's address is {address!r}: expected its dashboard, http://HOST:8265")
    return address.rstrip("/")


def connect(address: str, *, insecure: bool) -> Any:
    """Return Ray's client of a cluster that asks for a token.

    Raises:
        ConfigError: It answers without one, or others may read ours, and ``insecure`` does not allow that; or the token
            is not accepted.
        GenrecalError: It does not answer.
    """
    try:
        exposure = cluster_exposure(address)
    except OSError as error:
        raise GenrecalError(f"no Ray dashboard at {address}: is the cluster running, and the address right?") from error
    if not insecure:
        require_private(exposure or token_exposure({**os.environ, "RAY_AUTH_MODE": "token"}), allowance="--insecure")
    # Ray reads its mode when it is imported
    os.environ["RAY_AUTH_MODE"] = "token" if exposure is None else "disabled"
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (RuntimeError, AuthenticationError) as error:
        raise ConfigError(
            f"the Ray cluster at {address} does not accept this client's token: set RAY_AUTH_TOKEN_PATH to a copy of "
            f"the cluster's, readable by you alone ({type(error).__name__})"
        ) from error
    except ConnectionError as error:
        raise GenrecalError(f"no Ray dashboard at {address}: is the cluster running, and the address right?") from error


def _depends(job: Job, other: Job) -> bool:
    order = ("cache", "train", "report")
    return order.index(other.kind) == order.index(job.kind) - 1
