"""Reads the files of a ZeRO-3 checkpoint tensor by tensor, without its engine and without as many processes.

A tensor is put together when it is read, and its shares are read from where they lie in the files of the old
processes straight to where they belong: nothing else of the files comes into memory.
"""

import math
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teacher_cache.errors import CheckpointError

MASTER = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")
FROZEN = "frozen"
BUFFER = "buffer"

Read = Callable[[], Tensor]
"""Reads one tensor of a checkpoint."""


def zero_tensors(tag: Path, *, world_size: int) -> dict[str, Read]:
    """Return how to read every tensor, under its kind and name: ``fp32:student.lm_head.weight``.

    Of trained parameters these are the master weights in float32 and the moments; then come frozen parameters and
    buffers.
    """
    models = [tag / model_states_name(rank) for rank in range(world_size)]
    optimizers = [optimizer_states_path(tag, rank) for rank in range(world_size)]
    first = load_states(models[0])
    trained = _trained(first["param_shapes"], optimizers)
    frozen = _frozen(first["frozen_param_shapes"] or {}, models)
    # few and small; a clone, since they may be views of more
    buffers = {f"{BUFFER}:{name}": first["module"][name].clone for name in first["buffer_names"]}
    return dict([*trained, *frozen]) | buffers


def weights(tensors: Mapping[str, Read]) -> dict[str, Read]:
    """Return how to read parameters and buffers, by the names that the module gives them."""
    parts = ((entry.partition(":"), read) for entry, read in tensors.items())
    return {name: read for (kind, _, name), read in parts if kind not in MOMENTS}


def model_states_name(rank: int) -> str:
    """Return the name of the file with one process's shares of the frozen parameters."""
    return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"


def optimizer_states_path(tag: Path, rank: int) -> Path:
    """Return the file with one process's shares of master weights and moments."""
    (path,) = tag.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return path


def load_states(path: Path, *, device: str = "cpu") -> Any:
    """Load what one process wrote, its tensors mapped where the file can be: not in torch's form before zip files.

    With device "meta" the tensors have no content.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    mapped = device == "cpu" and zipfile.is_zipfile(path)
    # all that DeepSpeed stores beside tensors and plain values
    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum]):
        return torch.load(path, map_location=device, weights_only=True, mmap=mapped)


@dataclass(frozen=True, kw_only=True)
class _States:
    """What one process wrote: an outline without content, or everything where the file is no zip file."""

    path: Path
    outline: Any
    records: frozenset[int]
    """Where the contents of tensors begin in the file."""

    def copy(self, flat: Tensor, start: int, part: Tensor) -> None:
        """Copy as many elements of one flat tensor, from the given one on, as a part of a whole tensor has."""
        if start + part.numel() > flat.numel():
            raise CheckpointError(
                f"{self.path} holds {flat.numel()} elements of a group of parameters, expected at least "
                f"{start + part.numel()}: it was written with settings that leave parts of the optimizer elsewhere"
            )
        if not flat.is_meta:
            part.copy_(flat.detach()[start : start + part.numel()])
            return
        # torch says where it would have read, but reckons it: hold that against what the file says
        begin = flat.untyped_storage()._checkpoint_offset
        if begin not in self.records:
            raise CheckpointError(
                f"{self.path}: torch {torch.__version__} expects a tensor at byte {begin}, where the file begins none. "
                "Install the version that wrote it, and report this"
            )
        with self.path.open("rb") as file:
            file.seek(begin + (int(flat.storage_offset()) + start) * flat.itemsize)
            read = file.readinto(part.view(torch.uint8).numpy().data)
        if read != part.nbytes:
            raise CheckpointError(f"{self.path} ends within a tensor: export or train from the checkpoint before it")


def _open_states(path: Path) -> _States:
    if not zipfile.is_zipfile(path):
        return _States(path=path, outline=load_states(path), records=frozenset())
    return _States(path=path, outline=load_states(path, device="meta"), records=frozenset(_record_offsets(path)))


def _record_offsets(path: Path) -> Iterator[int]:
    """Yield where the contents of a zip file's records begin: after a header with a name and extra fields."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for record in archive.infolist():
            file.seek(record.header_offset + 26)
            name_size, extra_size = struct.unpack("<HH", file.read(4))
            yield record.header_offset + 30 + name_size + extra_size


def _trained(groups: Sequence[Mapping[str, torch.Size]], paths: Sequence[Path]) -> Iterator[tuple[str, Read]]:
    opened = [_open_states(path) for path in paths]
    for group, shapes in enumerate(groups):
        start = 0
        for name, shape in shapes.items():
            for kind in (MASTER, *MOMENTS):
                shares = [(states, _flat_group(states.outline, group=group, kind=kind)) for states in opened]
                yield f"{kind}:{name}", partial(_join, shares, start=start, shape=shape)
            start += _share_size(shape, num_shares=len(paths))


def _frozen(shapes: Mapping[str, torch.Size], paths: Sequence[Path]) -> Iterator[tuple[str, Read]]:
    opened = [_open_states(path) for path in paths]
    for name, shape in shapes.items():
        shares = [(states, states.outline["frozen_param_fragments"][name].flatten()) for states in opened]
        yield f"{FROZEN}:{name}", partial(_join, shares, start=0, shape=shape)


def _flat_group(states: Any, *, group: int, kind: str) -> Tensor:
    state = states["optimizer_state_dict"]
    flat: Tensor = (
        state["fp32_flat_groups"][group] if kind == MASTER else state["optimizer_state_dict"]["state"][group][kind]
    )
    return flat


def _join(shares: Sequence[tuple[_States, Tensor]], *, start: int, shape: torch.Size) -> Tensor:
    whole = torch.empty(shape, dtype=shares[0][1].dtype)
    parts = whole.view(-1).split(_share_size(shape, num_shares=len(shares)))
    # small parameters have fewer parts than there are processes
    for part, (states, flat) in zip(parts, shares, strict=False):
        states.copy(flat, start, part)
    return whole


def _share_size(shape: torch.Size, *, num_shares: int) -> int:
    """Return how many elements every process holds; the last ones are padded."""
    return math.ceil(shape.numel() / num_shares)
