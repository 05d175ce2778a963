"""Records of tensors as one block of bytes: one piece of shared memory between processes, and one to pin."""

import functools
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import UInt8
from torch import Tensor

from distill.records import map_tensors, once_each

Record = TypeVar("Record")

_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor lies in a block."""

    start: int
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def pack(record: Record) -> tuple[UInt8[Tensor, " bytes"], Record]:
    """Return the bytes of all tensors in a record, each once, and the record with places in their stead."""
    placed: list[tuple[int, Tensor]] = []
    end = 0

    def place(tensor: Tensor) -> Place:
        nonlocal end
        start = end
        placed.append((start, tensor))
        end = -(-(start + tensor.nbytes) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return Place(start=start, stop=start + tensor.nbytes, dtype=tensor.dtype, shape=tuple(tensor.shape))

    skeleton = map_tensors(record, once_each(place))
    block = torch.empty(end, dtype=torch.uint8)
    for start, tensor in placed:
        block[start : start + tensor.nbytes] = tensor.contiguous().reshape(-1).view(torch.uint8)
    return block, skeleton


def unpack(block: UInt8[Tensor, " bytes"], skeleton: Record) -> Record:
    """Return the record that was packed; its tensors are views of the block, one for each that was packed."""

    @functools.cache
    def take(place: Place) -> Tensor:
        return block[place.start : place.stop].view(place.dtype).reshape(place.shape)

    return map_tensors(skeleton, take, kind=Place)
