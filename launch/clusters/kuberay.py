"""Render the jobs of a run for Kubernetes: a RayJob of KubeRay for the cache, Indexed Jobs for training and report.

Pure functions over plain objects; nothing is submitted here. The API server refuses what does not fit its schemas.
"""

import shlex
from collections.abc import Collection, Sequence
from typing import Any

import yaml

from launch.clusters.config import KubeRayConfig
from launch.clusters.jobs import Job, cache_shape, train_shape
from launch.clusters.kube_pods import Manifest, head_size, render_pod, submitter_size, worker_size
from launch.clusters.node_ranks import REFUSALS
from launch.run_config import RunConfig
from teacher_cache.errors import ConfigError

RUN_FILE = "/etc/genrecal/run.yaml"
MASTER_PORT = 29500
PYTHON = "python"
HEAD_LOSSES = 2
"""Clusters of the cache job that may be lost with their heads; all else the driver itself tries again."""


def manifests(
    config: RunConfig, jobs: Sequence[Job], *, submitted: str, names: Collection[str] | None = None
) -> list[Manifest]:
    """Return what is applied for the jobs that are not complete, their run file first.

    Args:
        config: The run file.
        jobs: All jobs of the run.
        submitted: Time of this submission, ISO 8601.
        names: Which of them are applied; by default all.

    Raises:
        ConfigError: The run file names no image, or the training processes do not spread evenly.
    """
    if config.cluster.kuberay.image is None:
        raise ConfigError("cluster.kuberay.image is not set: build one from Dockerfile and name it in the run file")
    left = [job for job in jobs if not job.complete]
    to_submit = [job for job in left if names is None or job.name in names]
    objects = [_run_file(config, left)] if to_submit else []
    for job in to_submit:
        before = [other for other in left if (other.kind, job.kind) in (("cache", "train"), ("train", "report"))]
        wait_command = _wait_command(config.cluster.kuberay, before, submitted=submitted) if before else []
        if job.kind == "cache":
            objects.append(_cache_job(config, job, config_map=_config_map(left), submitted=submitted))
        elif job.kind == "train":
            objects += _train_job(config, job, config_map=_config_map(left), wait_command=wait_command)
        else:
            objects.append(_report_job(config, job, config_map=_config_map(left), wait_command=wait_command))
    return objects


def as_yaml(objects: Sequence[Manifest]) -> str:
    """Return manifests as one YAML stream, without anchors."""
    return yaml.dump_all(objects, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=2**31)


class _PlainDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _run_file(config: RunConfig, jobs: Sequence[Job]) -> Manifest:
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    metadata = _metadata(config, _config_map(jobs), queued=False)
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"run.yaml": text}}


def _config_map(jobs: Sequence[Job]) -> str:
    return f"genrecal-run-{jobs[-1].key}"


def _cache_job(config: RunConfig, job: Job, *, config_map: str, submitted: str) -> Manifest:
    kube, shape = config.cluster.kuberay, cache_shape(config, config.cluster.kuberay.cache)
    arguments = [
        *(PYTHON, "-m", "launch.clusters.ray_driver", "cache", RUN_FILE),
        *("--attempts", str(kube.max_attempts), "--since", submitted),
    ]
    size = worker_size(kube, kube.cache, gpus=shape.gpus_per_node)
    worker = {
        "groupName": "replicas",
        "replicas": shape.nodes,
        "minReplicas": shape.nodes,
        "maxReplicas": shape.nodes,
        "rayStartParams": {},
        "template": {"spec": render_pod(kube, size, config_map=config_map, container="ray-worker")},
    }
    head = render_pod(kube, head_size(kube), config_map=config_map, container="ray-head")
    submitter = render_pod(kube, submitter_size(kube), config_map=config_map, container="ray-job-submitter")
    spec = {
        # one command of quoted words: the operator puts it behind `ray job submit --` in a shell line of its own
        "entrypoint": shlex.join(arguments),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": kube.keep_s,
        "activeDeadlineSeconds": kube.time_limit_s,
        # the operator starts a whole cluster again whatever the driver's exit code is
        "backoffLimit": HEAD_LOSSES,
        "submissionMode": "K8sJobMode",
        "submitterPodTemplate": {"spec": {**submitter, "restartPolicy": "Never"}},
        **({"suspend": True} if kube.queue is not None else {}),
        "rayClusterSpec": {
            "rayVersion": kube.ray_version,
            "authOptions": {"mode": "token"},
            "headGroupSpec": {
                # no replica of the teacher on the head, which has no GPU
                "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},
                "template": {"spec": head},
            },
            "workerGroupSpecs": [worker],
        },
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": _metadata(config, job.name), "spec": spec}


def _train_job(config: RunConfig, job: Job, *, config_map: str, wait_command: Sequence[str]) -> list[Manifest]:
    kube, student = config.cluster.kuberay, job.student or ""
    shape = train_shape(config, kube.train, where="cluster.kuberay.train")
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(config, job.name, queued=False),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"job-name": job.name},
            "ports": [{"name": "rendezvous", "port": MASTER_PORT}],
        },
    }
    command = [
        *(PYTHON, "-m", "launch.clusters.node_ranks", RUN_FILE, "--student", student),
        *("--nodes", str(shape.nodes), "--node", "$(JOB_COMPLETION_INDEX)"),
        *("--processes-per-node", str(shape.processes_per_node)),
        *("--master", f"{job.name}-0.{job.name}:{MASTER_PORT}"),
        *("--log-dir", literal(f"{config.output_dir}/logs/train-{student}-ranks")),
    ]
    size = worker_size(kube, kube.train, gpus=shape.gpus_per_node)
    pod = render_pod(kube, size, config_map=config_map, container="trainer", command=command, wait_command=wait_command)
    pod["subdomain"] = job.name
    pod["terminationGracePeriodSeconds"] = kube.grace_s
    spec = _job_spec(kube, pod, nodes=shape.nodes, failures=kube.max_restarts * shape.nodes)
    return [service, {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(config, job.name), "spec": spec}]


def _report_job(config: RunConfig, job: Job, *, config_map: str, wait_command: Sequence[str]) -> Manifest:
    kube = config.cluster.kuberay
    command = [PYTHON, "-m", "launch.clusters.report_job", RUN_FILE]
    size = worker_size(kube, kube.report, gpus=kube.report.gpus_per_node)
    pod = render_pod(kube, size, config_map=config_map, container="report", command=command, wait_command=wait_command)
    spec = _job_spec(kube, pod, nodes=1, failures=kube.max_attempts)
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(config, job.name), "spec": spec}


def _wait_command(kube: KubeRayConfig, before: Sequence[Job], *, submitted: str) -> list[str]:
    labels = [word for job in before for word in ("--job", job.label)]
    return [
        *(PYTHON, "-m", "launch.clusters.wait", RUN_FILE),
        *("--limit-s", str(kube.wait_s), "--since", submitted, *map(literal, labels)),
    ]


def _job_spec(kube: KubeRayConfig, pod: Manifest, *, nodes: int, failures: int) -> Manifest:
    return {
        "completionMode": "Indexed",
        "completions": nodes,
        "parallelism": nodes,
        "backoffLimit": failures,
        "activeDeadlineSeconds": kube.time_limit_s,
        "ttlSecondsAfterFinished": kube.keep_s,
        **({"suspend": True} if kube.queue is not None else {}),
        "podFailurePolicy": {
            "rules": [
                # of any container: one that waits for a job that was refused is refused too
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": list(REFUSALS)}},
                # preempted or drained: not the job's fault; its partners, which fail without it, do count
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"spec": {**pod, "restartPolicy": "Never"}},
    }


def literal(text: str) -> str:
    """Return a word of a container's command that Kubernetes leaves as it is: it replaces ``$(NAME)``."""
    return text.replace("$", "$$")


def _metadata(config: RunConfig, name: str, *, queued: bool = True) -> Manifest:
    kube = config.cluster.kuberay
    labels = {"app.kubernetes.io/name": "genrecal"}
    if queued and kube.queue is not None:
        labels["kueue.x-k8s.io/queue-name"] = kube.queue
    return {"name": name, "namespace": kube.namespace, "labels": labels}
