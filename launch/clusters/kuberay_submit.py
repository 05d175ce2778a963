"""Apply the manifests of a run with kubectl."""

from collections.abc import Collection, Sequence
from pathlib import Path

from launch.clusters.jobs import Job, Kind, run_jobs
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


def describe_kuberay(config: RunConfig, *, only: Collection[Kind] = ()) -> str:
    """Return the manifests as pure YAML, of some kinds of jobs or of all."""
    kube = config.cluster.kuberay
    if kube.image is None:
        kube = kube.model_copy(update={"image": UNSET_IMAGE})
        config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"kuberay": kube})})
    jobs = run_jobs(config)
    done = "".join(f"# complete already: {job.label}\n" for job in _chosen(jobs, only) if job.complete)
    unset = "# cluster.kuberay.image is not set: IMAGE stands for it\n" if kube.image == UNSET_IMAGE else ""
    if kube.claim is None:
        unset += "# cluster.kuberay.claim is not set: submitting is refused without it\n"
    names = [job.name for job in _chosen(jobs, only)]
    return done + unset + as_yaml(manifests(config, jobs, submitted=now(), names=names))


def submit_kuberay(config: RunConfig, *, only: Collection[Kind] = ()) -> list[Outcome]:
    """Apply what is neither complete nor under way, of some kinds of jobs or of all; what has ended is deleted first.

    Raises:
        ConfigError: The run file names no claim or no image, or the training processes do not spread evenly.
    """
    if config.cluster.kuberay.claim is None:
        raise ConfigError(
            "cluster.kuberay.claim is not set: the pods would write into themselves; name a ReadWriteMany claim"
        )
    jobs = run_jobs(config)
    chosen = _chosen(jobs, only)
    left = [job for job in chosen if not job.complete]
    states = kube_states([_submission(config, job) for job in left])
    under_way = [name for name, state in states.items() if state not in ENDED]
    objects = manifests(config, jobs, submitted=now(), names=[job.name for job in left if job.name not in under_way])
    _delete_ended(config, left, states)
    if objects:
        run_program(["kubectl", "apply", "--filename=-"], text=as_yaml(objects))
    outcomes = [Outcome(job=job, job_id=None, state="complete already") for job in chosen if job.complete]
    for job in left:
        running = job.name in under_way
        if not running:
            append(submit_folder(config), _submission(config, job))
        outcomes.append(Outcome(job=job, job_id=job.name, state="under way already" if running else "submitted"))
    return outcomes


def hidden_marks(config: RunConfig) -> str:
    """Return what to know where the claim's files, and so the marks, are not seen from here; nothing where they are."""
    data = config.cache.data.path if config.answers is None else config.answers.source
    if config.cluster.kuberay.claim is None or "://" in data or Path(data).exists():
        return ""
    return (
        f"{data} is not seen from here, so neither is what the jobs have left in the claim: none counts as complete "
        "already; those that are find it out when they start"
    )


def _chosen(jobs: Sequence[Job], only: Collection[Kind]) -> list[Job]:
    return [job for job in jobs if not only or job.kind in only]


def _delete_ended(config: RunConfig, jobs: Sequence[Job], states: dict[str, str]) -> None:
    for job in jobs:
        if states.get(job.name) in ENDED:
            kind = "rayjobs.ray.io" if job.kind == "cache" else "jobs.batch"
            namespace = f"--namespace={config.cluster.kuberay.namespace}"
            run_program(["kubectl", "delete", kind, job.name, namespace, "--wait=true"])


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
