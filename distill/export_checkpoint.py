"""Write the student of a checkpoint in the middle of a stage, as the trainer would have at that step."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from distill.adapters import add_adapters
from distill.checkpoint import RECORD, Checkpoint, damaged_files, intact_checkpoint, read_checkpoint
from distill.config import LoraConfig
from distill.export import export_student
from distill.processes import Processes
from distill.reshard import is_resharded, resharded_tensors
from distill.student import load_student
from distill.zero_files import Read, weights, zero_tensors
from teacher_cache.errors import CheckpointError

PREFIX = "student."
"""Of the student's tensors in the module that a stage trains."""
LONE = Processes(rank=0, world_size=1, device=torch.device("cpu"))


@dataclass(frozen=True)
class _Model:
    student: Any


@dataclass(frozen=True)
class _WholeStudent:
    """What an export asks of an engine."""

    model: _Model

    def gathered(self, parameter: nn.Parameter) -> contextlib.AbstractContextManager[None]:
        """Do nothing: every parameter is whole."""
        return contextlib.nullcontext()


def export_checkpoint(path: Path, target: Path) -> Path:
    """Write the student of one tag, or of the newest intact tag of a stage's folder; return the tag.

    No launcher is needed, whatever number of processes wrote the checkpoint.

    Raises:
        CheckpointError: The tag is damaged, or no tag of the stage is intact.
    """
    checkpoint = _intact_tag(path) if (path / RECORD).exists() else intact_checkpoint(path / "checkpoints")
    origin = checkpoint.record.origin
    base, dtype = Path(origin["student"]), origin["dtype"]
    student = load_student(base, dtype=dtype, trust_remote_code=origin["trust_remote_code"])
    if origin["lora"] is not None:
        add_adapters(student, LoraConfig.model_validate(origin["lora"]), seed=0)
    _load(student, _weights(checkpoint), where=checkpoint.directory)
    engine = _WholeStudent(_Model(student))
    export_student(cast(Any, engine), target, source=base, dtype=dtype, processes=LONE)
    return checkpoint.directory


def _intact_tag(tag: Path) -> Checkpoint:
    checkpoint = read_checkpoint(tag)
    damaged = [RECORD] if checkpoint is None else damaged_files(checkpoint, LONE)
    if checkpoint is None or damaged:
        raise CheckpointError(
            f"{tag} is damaged: {len(damaged)} files are missing or not as they were committed, first {damaged[0]}. "
            "Export the tag before it, or the stage's folder to take the newest intact one"
        )
    return checkpoint


def _weights(checkpoint: Checkpoint) -> dict[str, Read]:
    """Return how to read the student's parameters and buffers, by its own names."""
    tag, layout = checkpoint.directory, checkpoint.record.layout
    if layout["backend"] == "torch":
        model = torch.load(tag / "state.pt", map_location="cpu", weights_only=True, mmap=True)["model"]
        found: dict[str, Read] = {name: tensor.detach for name, tensor in model.items()}
    elif is_resharded(tag):
        found = weights(resharded_tensors(tag))
    else:
        found = weights(zero_tensors(tag, world_size=layout["world_size"]))
    return {name.removeprefix(PREFIX): read for name, read in found.items() if name.startswith(PREFIX)}


def _load(student: nn.Module, stored: dict[str, Read], *, where: Path) -> None:
    tensors = dict(student.named_parameters())
    buffers = {name: buffer for name, buffer in student.named_buffers() if name in stored}
    absent = sorted(tensors.keys() - stored.keys())
    if absent:
        raise CheckpointError(f"{where} lacks {len(absent)} of the student's parameters, first {absent[0]}")
    with torch.no_grad():
        for name, tensor in (tensors | buffers).items():
            tensor.copy_(stored[name]().view_as(tensor))
