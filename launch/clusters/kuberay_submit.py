"""Apply the manifests of a run with kubectl."""

from collections.abc import Sequence

from launch.clusters.jobs import Job, run_jobs
from launch.clusters.journal import Submission, append
from launch.clusters.kuberay import as_yaml, manifests
from launch.clusters.programs import run_program
from launch.clusters.states import kube_states
from launch.clusters.submission import Outcome, frozen_run_file, now, submit_folder
from launch.run_config import RunConfig
from teacher_cache.errors import ConfigError

ENDED = ("COMPLETE", "FAILED", "STOPPED", "SUCCEEDED")
"""States that a job does not leave by itself; one that Kueue keeps waiting is SUSPENDED."""
UNSET_IMAGE = "IMAGE"
"""Stands in a plan for the image that the run file does not name yet."""


def describe_kuberay(config: RunConfig) -> str:
    """Return the manifests as pure YAML."""
    kube = config.cluster.kuberay
    if kube.image is None:
        kube = kube.model_copy(update={"image": UNSET_IMAGE})
        config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"kuberay": kube})})
    jobs = run_jobs(config)
    done = "".join(f"# complete already: {job.label}\n" for job in jobs if job.complete)
    unset = "# cluster.kuberay.image is not set: IMAGE stands for it\n" if kube.image == UNSET_IMAGE else ""
    return done + unset + as_yaml(manifests(config, jobs))


def submit_kuberay(config: RunConfig) -> list[Outcome]:
    """Apply what is neither complete nor under way; what has ended without its marks is deleted first."""
    jobs = run_jobs(config)
    kube = config.cluster.kuberay
    states = kube_states([_submission(config, job) for job in jobs if not job.complete])
    _delete_ended(config, jobs, states)
    outcomes = [Outcome(job=job, job_id=None, state="complete already") for job in jobs if job.complete]
    left = [job for job in jobs if not job.complete]
    if not left:
        return outcomes
    if kube.claim is None and not _remote(config):
        raise ConfigError(
            "cluster.kuberay.claim is not set, but output_dir and cache are paths: the pods would write into "
            "themselves; name a ReadWriteMany claim"
        )
    under_way = [name for name, state in states.items() if state not in ENDED]
    objects = manifests(config, jobs, under_way=under_way)
    if objects:
        run_program(["kubectl", "apply", "--filename=-"], text=as_yaml(objects))
    for job in left:
        running = job.name in under_way
        if not running:
            append(submit_folder(config), _submission(config, job))
        outcomes.append(Outcome(job=job, job_id=job.name, state="under way already" if running else "submitted"))
    return outcomes


def _delete_ended(config: RunConfig, jobs: Sequence[Job], states: dict[str, str]) -> None:
    for job in jobs:
        if states.get(job.name) in ENDED:
            kind = "rayjobs.ray.io" if job.kind == "cache" else "jobs.batch"
            namespace = f"--namespace={config.cluster.kuberay.namespace}"
            run_program(["kubectl", "delete", kind, job.name, namespace, "--wait=true"])


def _remote(config: RunConfig) -> bool:
    return "://" in config.cache.uri and "://" in config.output_dir


def _submission(config: RunConfig, job: Job) -> Submission:
    return Submission(
        scheduler="kuberay",
        label=job.label,
        key=job.key,
        job_id=job.name,
        run_file=str(frozen_run_file(config)),
        submitted=now(),
        where={"namespace": config.cluster.kuberay.namespace},
    )
