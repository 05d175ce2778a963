"""Reads the files of a ZeRO-3 checkpoint as whole tensors, without its engine and without as many processes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "fp32"


@dataclass(frozen=True, kw_only=True)
class ZeroTensors:
    """All tensors of a checkpoint, by the names that the module gives them."""

    trained: dict[str, dict[str, Tensor]]
    """Master weights in float32 as `MASTER`, and `MOMENTS`."""
    frozen: dict[str, Tensor]
    buffers: dict[str, Tensor]

    @property
    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers."""
        return {name: states[MASTER] for name, states in self.trained.items()} | self.frozen | self.buffers


def read_zero_tensors(tag: Path, *, world_size: int) -> ZeroTensors:
    """Put the shares of all processes together."""
    models = [_load(tag / model_states_name(rank)) for rank in range(world_size)]
    optimizers = [_load(_optimizer_file(tag, rank))["optimizer_state_dict"] for rank in range(world_size)]
    first = models[0]
    buffer_names = set(first["buffer_names"])
    return ZeroTensors(
        trained=_trained(first["param_shapes"], optimizers),
        frozen={
            name: _join([model["frozen_param_fragments"][name] for model in models], shape)
            for name, shape in (first["frozen_param_shapes"] or {}).items()
        },
        buffers={name: tensor for name, tensor in first["module"].items() if name in buffer_names},
    )


def model_states_name(rank: int) -> str:
    """Return the name of the file with one process's shares of the frozen parameters."""
    return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"


def _trained(groups: list[Mapping[str, torch.Size]], optimizers: list[Any]) -> dict[str, dict[str, Tensor]]:
    trained: dict[str, dict[str, Tensor]] = {}
    for index, shapes in enumerate(groups):
        flat = {key: [state["optimizer_state_dict"]["state"][index][key] for state in optimizers] for key in MOMENTS}
        flat[MASTER] = [state["fp32_flat_groups"][index] for state in optimizers]
        offset = 0
        for name, shape in shapes.items():
            # every process holds an equal share, the last one padded
            size = math.ceil(shape.numel() / len(optimizers))
            trained[name] = {
                key: _join([share[offset : offset + size] for share in shares], shape) for key, shares in flat.items()
            }
            offset += size
    return trained


def _join(shares: list[Tensor], shape: torch.Size) -> Tensor:
    return torch.cat([share.flatten() for share in shares])[: shape.numel()].view(shape)


def _optimizer_file(tag: Path, rank: int) -> Path:
    (path,) = tag.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return path


def _load(path: Path) -> Any:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    # all that DeepSpeed stores beside tensors and plain values
    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum]):
        return torch.load(path, map_location="cpu", weights_only=True)
