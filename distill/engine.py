"""What a training backend offers, and the plain-torch one.

Every backend accumulates gradients so that a step uses ``sum over processes and micro-batches of loss``. A step may
have any number of micro-batches, the same on every process.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distill.config import Stage, TrainConfig
from distill.processes import Processes
from distill.stages import StageModel
from teacher_cache.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PartitionReport:
    """How one process holds the parameters, in elements."""

    parameters: int
    partitioned: int
    """Of these, how many exist whole only while a module runs."""
    held: int
    """Held by this process at rest: its shares, and the small parameters that stay gathered."""


class Engine(Protocol):
    """One stage's model with its optimizer."""

    model: StageModel

    def forward(self, **inputs: Any) -> Any:
        """Run the model's forward."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradient."""
        ...

    def gradient_norm(self) -> float:
        """Return the global norm of the accumulated gradient; not finite where any element is not."""
        ...

    def step(self, *, learning_rate: float) -> float:
        """Update the parameters after the last micro-batch; return the gradient norm before clipping."""
        ...

    def discard(self) -> None:
        """Drop the accumulated gradient instead of a step; parameters and optimizer state stay as they are."""
        ...

    def save(self, directory: Path) -> None:
        """Write parameters and optimizer state; every process calls this."""
        ...

    def load(self, directory: Path) -> None:
        """Read what ``save`` wrote."""
        ...

    def gathered(self, parameter: nn.Parameter) -> contextlib.AbstractContextManager[None]:
        """Make one parameter whole for reading; every process enters."""
        ...

    def partition_report(self) -> PartitionReport:
        """Count how the parameters are held."""
        ...

    def close(self) -> None:
        """Free what the engine holds beside the model."""
        ...


class TorchEngine:
    """One process, torch.optim.AdamW, float32: what ZeRO-3 is compared with."""

    def __init__(
        self, model: StageModel, *, stage: Stage, train: TrainConfig, dtype: str, processes: Processes
    ) -> None:
        if dtype != "float32":
            raise ConfigError(f"backend torch trains in float32, but the student's dtype is {dtype}: use backend zero3")
        config = train.stage(stage)
        self.model = model.to_device(processes.device)
        self._clipping = config.gradient_clipping
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._trained,
            lr=config.learning_rate,
            betas=config.adam_betas,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def forward(self, **inputs: Any) -> Any:
        """Run the model's forward."""
        return self.model(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradient."""
        loss.backward()

    def gradient_norm(self) -> float:
        """Return the norm of the gradient."""
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def discard(self) -> None:
        """Drop the gradient."""
        self._optimizer.zero_grad()

    def step(self, *, learning_rate: float) -> float:
        """Update the parameters."""
        norm = torch.nn.utils.clip_grad_norm_(self._trained, self._clipping or float("inf"))
        set_learning_rate(self._optimizer, learning_rate)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(norm)

    def save(self, directory: Path) -> None:
        """Write parameters and optimizer state."""
        directory.mkdir(parents=True, exist_ok=True)
        state = {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}
        torch.save(state, directory / "state.pt")

    def load(self, directory: Path) -> None:
        """Read what ``save`` wrote."""
        state = torch.load(directory / "state.pt", weights_only=True, map_location=next(self.model.parameters()).device)
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])

    def gathered(self, parameter: nn.Parameter) -> contextlib.AbstractContextManager[None]:
        """Do nothing: every parameter is whole."""
        return contextlib.nullcontext()

    def partition_report(self) -> PartitionReport:
        """Count the parameters."""
        total = sum(parameter.numel() for parameter in self.model.parameters())
        return PartitionReport(parameters=total, partitioned=0, held=total)

    def close(self) -> None:
        """Do nothing."""


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
