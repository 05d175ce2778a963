"""The processes that train together: what the launcher says, and sums over all of them."""

import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from teacher_cache.errors import ConfigError

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM_VARIABLES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
SLURM_PORTS = range(15_000, 30_000)
"""Below what operating systems hand out by themselves."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes that train together, as one of them sees it."""

    rank: int
    world_size: int
    device: torch.device

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the values summed over all processes."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Return the values of every process, by rank."""
        if self.world_size == 1:
            return [list(values)]
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        everyone = own.new_empty(self.world_size * len(own))
        torch.distributed.all_gather_into_tensor(everyone, own)
        return everyone.view(self.world_size, -1).tolist()

    def barrier(self) -> None:
        """Wait for all processes."""
        self.sum([0.0])


def launch_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the five launch variables: the launcher's, SLURM's, or those of a lone process.

    Raises:
        ConfigError: Some are set and others are not, or they contradict each other.
    """
    found = {name: environment[name] for name in LAUNCH_VARIABLES if name in environment}
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "RANK" not in found:
        found = _slurm_variables(environment) | found
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(found):
        return {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": _free_port(),
        }
    missing = [name for name in LAUNCH_VARIABLES if name not in found]
    if missing:
        raise ConfigError(
            f"the launch environment sets {', '.join(found)} but not {', '.join(missing)}: start through torchrun, "
            "or set all five, or none to train in this process alone"
        )
    _check_consistent(found, local_world_size=environment.get("LOCAL_WORLD_SIZE"))
    return found


def require_visible_gpu(local_rank: int, *, num_gpus: int, environment: Mapping[str, str]) -> None:
    """Raise ConfigError unless this process has a GPU of its own."""
    if local_rank >= num_gpus:
        visible = environment.get("CUDA_VISIBLE_DEVICES", "not set")
        raise ConfigError(
            f"LOCAL_RANK is {local_rank}, but this process sees {num_gpus} GPUs (CUDA_VISIBLE_DEVICES {visible}): "
            "start one process per GPU, each of which sees all of them"
        )


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM node list, such as ``gpu[007-012,20],login1``.

    Raises:
        ConfigError: It is no node list.
    """
    first = re.match(r"(?:[^\[\],\s]|\[[^\[\]]+\])+(?=,|$)", nodes)
    host = re.sub(r"\[([^\]]+)\]", lambda found: re.split("[-,]", found[1])[0], first[0]) if first else ""
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", host):
        raise ConfigError(
            f"the first host of SLURM's node list {nodes!r} is not clear: set MASTER_ADDR to the host of the first task"
        )
    return host


def _slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    found = {name: environment[source] for name, source in SLURM_VARIABLES.items() if source in environment}
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if nodes and "MASTER_ADDR" not in environment:
        found["MASTER_ADDR"] = first_host(nodes)
    job = environment.get("SLURM_JOB_ID", "")
    if job.isdecimal():
        # equal on all tasks, other for the steps that a node may run at once
        step = int("".join(filter(str.isdecimal, environment.get("SLURM_STEP_ID", ""))) or 0)
        found["MASTER_PORT"] = str(SLURM_PORTS.start + (31 * int(job) + step) % len(SLURM_PORTS))
    return found


def _check_consistent(found: Mapping[str, str], *, local_world_size: str | None) -> None:
    numbers = {name: found[name] for name in LAUNCH_VARIABLES if name != "MASTER_ADDR"}
    wrong = [f"{name} is {value!r}, expected a number" for name, value in numbers.items() if not value.isdecimal()]
    if not wrong:
        rank, size, local, port = map(int, numbers.values())
        limits = {"RANK": (rank, size, "WORLD_SIZE"), "LOCAL_RANK": (local, size, "WORLD_SIZE")}
        if local_world_size is not None and local_world_size.isdecimal():
            limits["LOCAL_RANK"] = (local, int(local_world_size), "LOCAL_WORLD_SIZE")
        wrong = [
            f"{name} is {value}, expected less than {bound} ({limit})"
            for name, (value, limit, bound) in limits.items()
            if value >= limit
        ]
        wrong += [] if 0 < port < 2**16 else [f"MASTER_PORT is {port}, expected 1 to 65535"]
    if not found["MASTER_ADDR"].strip():
        wrong.append("MASTER_ADDR is empty, expected a host")
    if wrong:
        raise ConfigError(f"the launch environment contradicts itself: {'; '.join(wrong)}. Start through torchrun")


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
