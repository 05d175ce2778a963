"""Where the replicas of a build run: what Ray reserves for each of them."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from teacher_cache.config import BuildConfig, CacheConfig
from teacher_cache.errors import ConfigError
from teacher_cache.vllm_teacher import engine_environment


@dataclass(frozen=True, kw_only=True)
class ReplicaResources:
    """What one replica of the teacher needs."""

    cpus: float
    gpus: float
    spans_nodes: bool
    """Whether no single node has that many GPUs: a placement group then holds one GPU per bundle."""


def replica_resources(build: BuildConfig, *, available: dict[str, float], gpus_per_node: float) -> ReplicaResources:
    """Return what a replica needs on a cluster with these resources.

    Raises:
        ConfigError: The replicas together need more than there is.
    """
    gpus = build.gpus_per_replica
    if gpus is None:
        gpus = build.tensor_parallel_size * build.pipeline_parallel_size if available.get("GPU", 0) else 0
    for kind, wanted in (("CPU", build.cpus_per_replica), ("GPU", gpus)):
        if wanted * build.num_replicas > available.get(kind, 0):
            raise ConfigError(
                f"{build.num_replicas} replica(s) with {wanted:g} {kind}(s) each do not fit the Ray cluster, which "
                f"has {available.get(kind, 0):g} {kind}(s); lower `build.num_replicas` or add nodes"
            )
    return ReplicaResources(cpus=build.cpus_per_replica, gpus=gpus, spans_nodes=gpus > max(gpus_per_node, 1))


class ReplicaPlacement:
    """Starts actors that each hold one replica, and gives back what they reserved."""

    def __init__(self, ray: ModuleType, config: CacheConfig) -> None:
        """Look at the cluster that ``ray`` is connected to.

        Raises:
            ConfigError: The replicas do not fit.
        """
        self._ray = ray
        nodes = [node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]]
        self.resources = replica_resources(
            config.build, available=ray.cluster_resources(), gpus_per_node=max(nodes, default=0)
        )
        self._environment = engine_environment(model=config.teacher.model, on_cuda=self.resources.gpus > 0)
        self._groups: dict[Any, Any] = {}

    def start(self, actor_class: type, *arguments: Any) -> Any:
        """Return a new actor; it may have to wait for its resources."""
        options: dict[str, Any] = {
            "max_restarts": 0,
            "max_task_retries": 0,
            "num_cpus": self.resources.cpus,
            "runtime_env": {"env_vars": self._environment},
        }
        if not self.resources.spans_nodes:
            return self._ray.remote(actor_class).options(**options, num_gpus=self.resources.gpus).remote(*arguments)
        first = {"GPU": 1, "CPU": self.resources.cpus}
        bundles = [first, *({"GPU": 1} for _ in range(round(self.resources.gpus) - 1))]
        group = self._ray.util.placement_group(bundles, strategy="PACK")
        strategy = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
        )
        actor = self._ray.remote(actor_class).options(**options, scheduling_strategy=strategy).remote(*arguments)
        self._groups[actor] = group
        return actor

    def stop(self, actor: Any) -> None:
        """Kill an actor and free what it reserved."""
        self._ray.kill(actor)
        if (group := self._groups.pop(actor, None)) is not None:
            self._ray.util.remove_placement_group(group)
