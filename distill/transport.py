"""Records of tensors as one block of bytes: one piece of shared memory between processes, and one to pin."""

import io
import pickle
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

_ALIGNMENT_BYTES = 64


def pack(record: object) -> tuple[UInt8[Tensor, " bytes"], bytes]:
    """Return the bytes of all tensors in a record, and the record with references in their place."""
    skeleton = io.BytesIO()
    pickler = _Pickler(skeleton)
    pickler.dump(record)
    block = torch.empty(pickler.size_bytes, dtype=torch.uint8)
    for start, tensor in pickler.placed:
        block[start : start + tensor.nbytes] = tensor.contiguous().reshape(-1).view(torch.uint8)
    return block, skeleton.getvalue()


def unpack(block: UInt8[Tensor, " bytes"], skeleton: bytes) -> Any:
    """Return the record that was packed; its tensors are views of the block."""
    return _Unpickler(io.BytesIO(skeleton), block).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.placed: list[tuple[int, Tensor]] = []
        self.size_bytes = 0

    def persistent_id(self, value: object) -> Any:
        """Put a tensor into the block and return where it lies."""
        if not isinstance(value, Tensor):
            return None
        start = self.size_bytes
        self.placed.append((start, value))
        self.size_bytes = -(-(start + value.nbytes) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return start, value.nbytes, value.dtype, tuple(value.shape)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, block: Tensor) -> None:
        super().__init__(file)
        self._block = block

    def persistent_load(self, reference: Any) -> Tensor:
        """Return the tensor that lies at a place of the block."""
        start, size, dtype, shape = reference
        return self._block[start : start + size].view(dtype).reshape(shape)
