"""The processes that train together: what the launcher says, and sums over all of them."""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from teacher_cache.errors import ConfigError

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM_VARIABLES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


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
        everyone = own.new_empty(self.world_size, len(own))
        torch.distributed.all_gather_into_tensor(everyone, own)
        return everyone.tolist()

    def barrier(self) -> None:
        """Wait for all processes."""
        self.sum([0.0])


def launch_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the five launch variables: the launcher's, SLURM's, or those of a lone process.

    Raises:
        ConfigError: Some are set and others are not.
    """
    found = {name: environment[name] for name in LAUNCH_VARIABLES if name in environment}
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "RANK" not in found:
        found |= {name: environment[source] for name, source in SLURM_VARIABLES.items() if source in environment}
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
    return found


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
