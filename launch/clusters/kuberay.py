"""Render the jobs of a run for Kubernetes: a RayJob of KubeRay for the cache, Indexed Jobs for training and report.

Pure functions over plain objects; nothing is submitted here. The API server refuses what does not fit its schemas.
"""

import math
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import yaml

from launch.clusters.config import KubeJobConfig, KubeRayConfig
from launch.clusters.jobs import Job, cache_nodes, train_shape
from launch.clusters.node_ranks import REFUSALS
from launch.run_config import RunConfig
from teacher_cache.errors import ConfigError

RUN_FILE = "/etc/genrecal/run.yaml"
MASTER_PORT = 29500
PYTHON = "python"
Manifest = dict[str, Any]


def manifests(config: RunConfig, jobs: Sequence[Job], *, under_way: Collection[str] = ()) -> list[Manifest]:
    """Return what is applied for the jobs that are neither complete nor under way (by name), their run file first.

    Raises:
        ConfigError: The run file names no image, or the training processes do not spread evenly.
    """
    if config.cluster.kuberay.image is None:
        raise ConfigError("cluster.kuberay.image is not set: build one from Dockerfile and name it in the run file")
    left = [job for job in jobs if not job.complete]
    to_submit = [job for job in left if job.name not in under_way]
    objects = [_run_file(config, left)] if to_submit else []
    for job in to_submit:
        before = [other for other in left if (other.kind, job.kind) in (("cache", "train"), ("train", "report"))]
        if job.kind == "cache":
            objects.append(_cache_job(config, job, left))
        elif job.kind == "train":
            objects += _train_job(config, job, left, before)
        else:
            objects.append(_report_job(config, job, left, before))
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


def _cache_job(config: RunConfig, job: Job, jobs: Sequence[Job]) -> Manifest:
    kube = config.cluster.kuberay
    arguments = [PYTHON, "-m", "launch.clusters.ray_driver", "cache", RUN_FILE, "--attempts", str(kube.max_attempts)]
    nodes = cache_nodes(config, kube.cache)
    head = kube.cache.model_copy(update={"gpus_per_node": 0})
    worker = {
        "groupName": "replicas",
        "replicas": nodes,
        "minReplicas": nodes,
        "maxReplicas": nodes,
        "rayStartParams": {},
        "template": {"spec": _pod(kube, kube.cache, jobs, container="ray-worker")},
    }
    spec = {
        # one command of quoted words: the operator puts it behind `ray job submit --` in a shell line of its own
        "entrypoint": shlex.join(arguments),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": kube.keep_s,
        "activeDeadlineSeconds": kube.time_limit_s,
        "backoffLimit": kube.max_attempts,
        "submissionMode": "K8sJobMode",
        **({"suspend": True} if kube.queue is not None else {}),
        "rayClusterSpec": {
            "rayVersion": kube.ray_version,
            "authOptions": {"mode": "token"},
            "headGroupSpec": {
                # no replica of the teacher on the head, which has no GPU
                "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},
                "template": {"spec": _pod(kube, head, jobs, container="ray-head")},
            },
            "workerGroupSpecs": [worker],
        },
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": _metadata(config, job.name), "spec": spec}


def _train_job(config: RunConfig, job: Job, jobs: Sequence[Job], before: Sequence[Job]) -> list[Manifest]:
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
    pod = _pod(kube, kube.train, jobs, container="trainer", command=command, before=before)
    pod["subdomain"] = job.name
    spec = _job_spec(kube, pod, nodes=shape.nodes)
    return [service, {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(config, job.name), "spec": spec}]


def _report_job(config: RunConfig, job: Job, jobs: Sequence[Job], before: Sequence[Job]) -> Manifest:
    kube = config.cluster.kuberay
    command = [PYTHON, "-m", "launch.clusters.report_job", RUN_FILE]
    pod = _pod(kube, kube.report, jobs, container="report", command=command, before=before)
    spec = _job_spec(kube, pod, nodes=1)
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(config, job.name), "spec": spec}


def _job_spec(kube: KubeRayConfig, pod: Manifest, *, nodes: int) -> Manifest:
    refused = {"containerName": pod["containers"][0]["name"], "operator": "In", "values": list(REFUSALS)}
    return {
        "completionMode": "Indexed",
        "completions": nodes,
        "parallelism": nodes,
        "backoffLimit": kube.max_attempts * nodes,
        "activeDeadlineSeconds": kube.time_limit_s,
        "ttlSecondsAfterFinished": kube.keep_s,
        **({"suspend": True} if kube.queue is not None else {}),
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": refused},
                # preempted or drained: not the job's fault
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"spec": {**pod, "restartPolicy": "Never"}},
    }


def _pod(
    kube: KubeRayConfig,
    resources: KubeJobConfig,
    jobs: Sequence[Job],
    *,
    container: str,
    command: Sequence[str] = (),
    before: Sequence[Job] = (),
) -> Manifest:
    mounts = [
        {"name": "run-file", "mountPath": "/etc/genrecal", "readOnly": True},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
    ]
    volumes: list[Manifest] = [
        {"name": "run-file", "configMap": {"name": _config_map(jobs)}},
        {
            "name": "shared-memory",
            "emptyDir": {"medium": "Memory", "sizeLimit": f"{_mebibytes(resources.shared_memory_gib)}Mi"},
        },
    ]
    if kube.claim is not None:
        mounts.append({"name": "workspace", "mountPath": kube.mount_path})
        volumes.append({"name": "workspace", "persistentVolumeClaim": {"claimName": kube.claim}})
    shared = {
        "image": kube.image,
        **({"workingDir": kube.mount_path} if kube.claim is not None else {}),
        "env": [
            {"name": name, "valueFrom": {"secretKeyRef": {"name": source.secret, "key": source.key}}}
            for name, source in kube.secrets.items()
        ],
        "volumeMounts": mounts,
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    amounts = {"cpu": f"{round(resources.cpus_per_node * 1000)}m", "memory": f"{_mebibytes(resources.memory_gib)}Mi"}
    gpus = {"nvidia.com/gpu": resources.gpus_per_node} if resources.gpus_per_node else {}
    main = {
        "name": container,
        **shared,
        **({"command": list(command)} if command else {}),
        "resources": {"requests": {**amounts, **gpus}, "limits": {"memory": amounts["memory"], **gpus}},
    }
    pod: Manifest = {
        "securityContext": {"runAsNonRoot": True, "fsGroup": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [main],
        "volumes": volumes,
    }
    if before:
        pod["initContainers"] = [_waiting(kube, shared, before)]
    if kube.service_account is not None:
        pod["serviceAccountName"] = kube.service_account
    if kube.node_selector:
        pod["nodeSelector"] = dict(kube.node_selector)
    if kube.tolerations:
        pod["tolerations"] = [dict(toleration) for toleration in kube.tolerations]
    return pod


def _waiting(kube: KubeRayConfig, shared: Mapping[str, Any], before: Sequence[Job]) -> Manifest:
    command = [PYTHON, "-m", "launch.clusters.wait", RUN_FILE, "--limit-s", str(kube.wait_s)]
    for job in before:
        command += ["--job", job.label]
    small = {"cpu": "500m", "memory": "2Gi"}
    return {"name": "wait", **shared, "command": command, "resources": {"requests": small, "limits": small}}


def literal(text: str) -> str:
    """Return a word of a container's command that Kubernetes leaves as it is: it replaces ``$(NAME)``."""
    return text.replace("$", "$$")


def _metadata(config: RunConfig, name: str, *, queued: bool = True) -> Manifest:
    kube = config.cluster.kuberay
    labels = {"app.kubernetes.io/name": "genrecal"}
    if queued and kube.queue is not None:
        labels["kueue.x-k8s.io/queue-name"] = kube.queue
    return {"name": name, "namespace": kube.namespace, "labels": labels}


def _mebibytes(gib: float) -> int:
    return math.ceil(gib * 1024)
