"""What schedulers say of the jobs that were handed to them; a scheduler that cannot be asked says nothing."""

import json
from collections.abc import Callable, Sequence

from launch.clusters.journal import Scheduler, Submission
from launch.clusters.programs import run_program
from teacher_cache.errors import GenrecalError


def scheduler_states(entries: Sequence[Submission]) -> dict[str, str]:
    """Return the state of each job by its id, as far as its scheduler tells."""
    states: dict[str, str] = {}
    for scheduler, ask in ASKED.items():
        own = [entry for entry in entries if entry.scheduler == scheduler]
        if own:
            states |= ask(own)
    return states


def slurm_states(entries: Sequence[Submission]) -> dict[str, str]:
    """Ask the accounting, and the queue, which is right where they differ; tasks of arrays have ids of their own."""
    numbers = ",".join(sorted({entry.job_id.partition("_")[0] for entry in entries}))
    accounting = ["sacct", "--noheader", "--parsable2", "--allocations", "--array", "--format=JobID,State"]
    queue = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T"]
    states: dict[str, str] = {}
    for command in (accounting, queue):
        for line in _answer([*command, f"--jobs={numbers}"]).splitlines():
            job_id, _, state = line.partition("|")
            states[job_id] = state.split()[0] if state else "UNKNOWN"
    return states


def ray_states(entries: Sequence[Submission]) -> dict[str, str]:
    """Ask the Ray cluster of each job."""
    from launch.clusters.ray_submit import connect

    states: dict[str, str] = {}
    for address in {entry.where.get("address", "") for entry in entries}:
        try:
            client = connect(address, insecure=True)
            known = {job.submission_id: job.status.value for job in client.list_jobs()}
        except (GenrecalError, ConnectionError, RuntimeError, OSError):
            continue
        states |= {entry.job_id: known[entry.job_id] for entry in entries if entry.job_id in known}
    return states


def kube_states(entries: Sequence[Submission]) -> dict[str, str]:
    """Ask Kubernetes for each RayJob and Job."""
    states: dict[str, str] = {}
    for entry in entries:
        kind = "rayjobs.ray.io" if entry.label == "cache" else "jobs.batch"
        namespace = f"--namespace={entry.where.get('namespace', 'default')}"
        answer = _answer(["kubectl", "get", kind, entry.job_id, namespace, "--output=json"])
        if answer:
            states[entry.job_id] = kube_state(json.loads(answer).get("status", {}))
    return states


def kube_state(status: dict[str, object]) -> str:
    """Return one word about a RayJob's or a Job's status."""
    if deployment := status.get("jobDeploymentStatus"):
        # before its end the operator may still start a job again whose jobStatus says that it failed
        if deployment == "Complete" and (ended := status.get("jobStatus")):
            return str(ended)
        return "FAILED" if deployment == "ValidationFailed" else str(deployment).upper()
    conditions = status.get("conditions")
    for condition in conditions if isinstance(conditions, list) else []:
        if condition.get("status") == "True" and condition.get("type") in ("Complete", "Failed", "Suspended"):
            return str(condition["type"]).upper()
    return "RUNNING" if status.get("active") else "PENDING"


def _answer(command: Sequence[str]) -> str:
    try:
        return run_program(command)
    except GenrecalError:  # not installed here, no accounting, or the job is forgotten
        return ""


ASKED: dict[Scheduler, Callable[[Sequence[Submission]], dict[str, str]]] = {
    "slurm": slurm_states,
    "ray": ray_states,
    "kuberay": kube_states,
}
