"""Commands on nodes of a Ray cluster: one actor per node, which starts that node's processes."""

import logging
import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.clusters.jobs import TrainShape
from launch.clusters.node_ranks import NodePlace, decisive, run_ranks
from teacher_cache.errors import ConfigError

logger = logging.getLogger(__name__)

LOST = 128 + 9
"""Exit code that stands for a node that was lost with its processes."""
LOOK_S = 30.0
"""Seconds between two looks at the nodes while a reservation waits."""
GROWTH_S = 900.0
"""Seconds in which a cluster whose nodes are too small may get others: some grow with what is asked for."""


class NodeRunner:
    """Runs commands on the node where Ray has put it; its processes end with it."""

    def __init__(self, working_dir: str) -> None:
        os.chdir(working_dir)

    def master(self) -> tuple[str, int]:
        """Return an address and a free port at which this node can be reached."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def run_ranks(self, command: Sequence[str], place: NodePlace, log_dir: Path) -> int:
        """Run a command as the training processes of this node."""
        return run_ranks(command, place=place, log_dir=log_dir)

    def run(self, command: Sequence[str]) -> int:
        """Run a command and return its exit code."""
        code = subprocess.run(command, check=False).returncode
        return code if code >= 0 else 128 - code


def run_on_nodes(
    command: Sequence[str],
    *,
    shape: TrainShape | None,
    cpus_per_node: float,
    gpus_per_node: float,
    log_dir: Path,
) -> int:
    """Run a command on nodes that are reserved together; return the exit code that says most.

    Args:
        command: What to run.
        shape: How its processes spread over nodes, connected by the launch variables; None for one plain process.
        cpus_per_node: CPUs to reserve on each node.
        gpus_per_node: GPUs to reserve on each node.
        log_dir: Folder for the output of all training processes but the first of each node.

    Raises:
        ConfigError: The cluster's nodes cannot hold what is reserved.
    """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    ray.init(ignore_reinit_error=True, logging_level=logging.WARNING)
    nodes = 1 if shape is None else shape.nodes
    bundle = {"CPU": cpus_per_node} | ({"GPU": gpus_per_node} if gpus_per_node else {})
    group = ray.util.placement_group([bundle] * nodes, strategy="STRICT_SPREAD" if nodes > 1 else "PACK")
    actors: list[Any] = []
    try:
        logger.info("waiting for %d node(s) with %s each", nodes, bundle)
        _wait_for_reservation(ray, group, bundle, nodes=nodes)
        for index in range(nodes):
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            actor = ray.remote(NodeRunner).options(
                num_cpus=cpus_per_node, num_gpus=gpus_per_node, scheduling_strategy=place, max_restarts=0
            )
            actors.append(actor.remote(os.getcwd()))
        return _run(ray, actors, command, shape=shape, log_dir=log_dir)
    except ray.exceptions.RayActorError as error:
        logger.info("a node was lost: %s", error)
        return LOST
    finally:
        for actor in actors:
            ray.kill(actor)
        ray.util.remove_placement_group(group)


def _wait_for_reservation(ray: Any, group: Any, bundle: Mapping[str, float], *, nodes: int) -> None:
    ready, hold_since, told = group.ready(), time.monotonic(), ""
    while not ray.wait([ready], timeout=LOOK_S)[0]:
        lacking = too_small(ray.nodes(), bundle, nodes=nodes)
        if not lacking:
            hold_since = time.monotonic()
        elif time.monotonic() - hold_since >= GROWTH_S:
            raise ConfigError(f"{lacking}; lower gpus_per_node or cpus_per_node under cluster.ray, or add nodes")
        if lacking not in ("", told):
            logger.warning("%s: waiting %.0f s for others", lacking, GROWTH_S)
        told = lacking


def too_small(found: Sequence[Mapping[str, Any]], bundle: Mapping[str, float], *, nodes: int) -> str:
    """Return why a cluster cannot hold the bundle so many times even while nothing else runs; nothing where it can."""
    alive = [node for node in found if node["Alive"]]
    small = [node for node in alive if any(node["Resources"].get(kind, 0) < least for kind, least in bundle.items())]
    if len(alive) - len(small) >= nodes:
        return ""
    listed = "; ".join(f"{node['NodeManagerAddress']} has {_amounts(node['Resources'], bundle)}" for node in small)
    return (
        f"{nodes} node(s) with {_amounts(bundle, bundle)} each are needed, of which the Ray cluster has "
        f"{len(alive) - len(small)}{f' ({listed})' if listed else ''}"
    )


def _amounts(resources: Mapping[str, float], kinds: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(kind, 0):g} {kind}(s)" for kind in kinds)


def _run(ray: Any, actors: Sequence[Any], command: Sequence[str], *, shape: TrainShape | None, log_dir: Path) -> int:
    if shape is None:
        return ray.get(actors[0].run.remote(command))
    address, port = ray.get(actors[0].master.remote())
    places = [
        NodePlace(
            node=node,
            nodes=shape.nodes,
            processes_per_node=shape.processes_per_node,
            master_address=address,
            master_port=port,
        )
        for node in range(shape.nodes)
    ]
    calls = [actor.run_ranks.remote(command, place, log_dir) for actor, place in zip(actors, places, strict=True)]
    codes: list[int] = []
    while calls and not any(codes):
        done, calls = ray.wait(calls)
        codes += ray.get(done)
    if calls:  # give the others the time to say why
        done, _ = ray.wait(calls, num_returns=len(calls), timeout=30.0)
        codes += ray.get(done)
    return decisive(codes)
