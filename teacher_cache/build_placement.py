"""Where the replicas of a build run: what Ray reserves for each of them, and the nodes where none starts any more."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

from teacher_cache.config import BuildConfig, CacheConfig
from teacher_cache.errors import ConfigError
from teacher_cache.vllm_teacher import engine_environment

_NODE_LABEL: Final = "ray.io/node-id"


@dataclass(frozen=True, kw_only=True)
class ReplicaResources:
    """What one replica of the teacher needs, on one node."""

    cpus: float
    gpus: float

    def fit(self, available: Mapping[str, float]) -> bool:
        """Tell whether a node with these resources can hold a replica."""
        return self.cpus <= available.get("CPU", 0) and self.gpus <= available.get("GPU", 0)


def replica_resources(build: BuildConfig, *, available: Mapping[str, float], gpus_per_node: float) -> ReplicaResources:
    """Return what a replica needs on a cluster with these resources.

    Raises:
        ConfigError: The replicas together need more than there is, or one needs more GPUs than any node has.
    """
    gpus = build.gpus_per_replica
    if gpus is None:
        gpus = build.tensor_parallel_size * build.pipeline_parallel_size if available.get("GPU", 0) else 0
    for kind, wanted in (("CPU", build.cpus_per_replica), ("GPU", gpus)):
        if wanted * build.num_replicas > available.get(kind, 0):
            raise ConfigError(
                f"{build.num_replicas} replica(s) with {wanted:g} {kind}(s) each do not fit the Ray cluster, which "
                f"has {available.get(kind, 0):g} {kind}(s); lower `cache.build.num_replicas` or add nodes"
            )
    if gpus > gpus_per_node:
        raise ConfigError(
            f"a replica takes {gpus:g} GPU(s), but no node has more than {gpus_per_node:g}, and replicas do not span "
            "nodes: lower `cache.build.tensor_parallel_size` x `cache.build.pipeline_parallel_size`, or use larger "
            "nodes or a smaller teacher"
        )
    return ReplicaResources(cpus=build.cpus_per_replica, gpus=gpus)


class ReplicaPlacement:
    """Starts actors that each hold one replica."""

    def __init__(self, ray: ModuleType, config: CacheConfig) -> None:
        """Look at the cluster that ``ray`` is connected to.

        Raises:
            ConfigError: The replicas do not fit.
        """
        self._ray = ray
        self.resources = replica_resources(
            config.build,
            available=ray.cluster_resources(),
            gpus_per_node=max((node["Resources"].get("GPU", 0) for node in self._nodes()), default=0),
        )
        self._environment = engine_environment(model=config.teacher.model, on_cuda=self.resources.gpus > 0)
        self._avoided: set[str] = set()

    def start(self, actor_class: type, *arguments: Any) -> Any:
        """Return a new actor; it may have to wait for its resources."""
        options: dict[str, Any] = {
            "max_restarts": 0,
            "max_task_retries": 0,
            "num_cpus": self.resources.cpus,
            "num_gpus": self.resources.gpus,
            "runtime_env": {"env_vars": self._environment},
        }
        if self._avoided:
            options["label_selector"] = {_NODE_LABEL: f"!in({','.join(sorted(self._avoided))})"}
        return self._ray.remote(actor_class).options(**options).remote(*arguments)

    def stop(self, actor: Any) -> None:
        """Kill an actor and free what it reserved."""
        self._ray.kill(actor)

    def node_of(self, actor: Any) -> str:
        """Return the id of the node of an actor that is idle.

        Raises:
            ray.exceptions.RayError: It has died.
        """
        return str(self._ray.get(actor.__ray_call__.remote(_node_id)))

    def avoid(self, node: str) -> None:
        """Start no further actor on a node."""
        self._avoided.add(node)

    def has_place(self) -> bool:
        """Tell whether actors may start, now or once nodes join: not where all that could hold one are avoided."""
        if not self._avoided:
            return True
        large = {node["NodeID"] for node in self._nodes() if self.resources.fit(node["Resources"])}
        return not large or not large <= self._avoided

    def _nodes(self) -> Iterable[dict[str, Any]]:
        return (node for node in self._ray.nodes() if node["Alive"])


def _node_id(_: Any) -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())
