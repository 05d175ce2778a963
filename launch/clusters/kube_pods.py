"""Pods of the jobs of a run on Kubernetes: one image, one shared folder, no privileges, secrets by reference."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.clusters.config import KubeJobConfig, KubeRayConfig

Manifest = dict[str, Any]
WAITING = {"cpu": "500m", "memory": "2Gi"}
"""What a container that waits for other jobs needs."""


@dataclass(frozen=True, kw_only=True)
class PodSize:
    """What one pod asks for, and where it may run."""

    cpus: float
    memory_gib: float
    shared_memory_gib: float
    gpus: int
    node_selector: Mapping[str, str]


def worker_size(kube: KubeRayConfig, resources: KubeJobConfig, *, gpus: int) -> PodSize:
    """Return the size of a pod that computes on so many GPUs."""
    return PodSize(
        cpus=resources.cpus_per_node,
        memory_gib=resources.memory_gib,
        shared_memory_gib=resources.shared_memory_gib,
        gpus=gpus,
        node_selector=kube.node_selector,
    )


def head_size(kube: KubeRayConfig) -> PodSize:
    """Return the size of the head of a Ray cluster."""
    head = kube.head
    return PodSize(
        cpus=head.cpus,
        memory_gib=head.memory_gib,
        shared_memory_gib=head.shared_memory_gib,
        gpus=0,
        node_selector=head.node_selector,
    )


def submitter_size(kube: KubeRayConfig) -> PodSize:
    """Return the size of the pod that submits the driver and follows its log."""
    return PodSize(cpus=0.5, memory_gib=2, shared_memory_gib=0.0625, gpus=0, node_selector=kube.head.node_selector)


def render_pod(
    kube: KubeRayConfig,
    size: PodSize,
    *,
    config_map: str,
    container: str,
    command: Sequence[str] = (),
    wait_command: Sequence[str] = (),
) -> Manifest:
    """Return the specification of a pod.

    Args:
        kube: What all pods have in common.
        size: What this one asks for.
        config_map: Name of the map that holds the run file.
        container: Name of its container.
        command: What it runs; by default what its operator gives it.
        wait_command: What it runs first, without a GPU.
    """
    mounts = [
        {"name": "run-file", "mountPath": "/etc/genrecal", "readOnly": True},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
    ]
    volumes: list[Manifest] = [
        {"name": "run-file", "configMap": {"name": config_map}},
        {
            "name": "shared-memory",
            "emptyDir": {"medium": "Memory", "sizeLimit": f"{_mebibytes(size.shared_memory_gib)}Mi"},
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
    amounts = {"cpu": f"{round(size.cpus * 1000)}m", "memory": f"{_mebibytes(size.memory_gib)}Mi"}
    gpus = {"nvidia.com/gpu": size.gpus} if size.gpus else {}
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
    if wait_command:
        waiting = {"requests": WAITING, "limits": WAITING}
        pod["initContainers"] = [{"name": "wait", **shared, "command": list(wait_command), "resources": waiting}]
    if kube.service_account is not None:
        pod["serviceAccountName"] = kube.service_account
    if size.node_selector:
        pod["nodeSelector"] = dict(size.node_selector)
    if kube.tolerations:
        pod["tolerations"] = [dict(toleration) for toleration in kube.tolerations]
    return pod


def _mebibytes(gib: float) -> int:
    return math.ceil(gib * 1024)
