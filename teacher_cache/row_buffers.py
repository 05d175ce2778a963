"""Memory for rows that were read, used again once nobody holds them: a fresh page costs as much as reading into it."""

import math
import mmap
import weakref
from typing import Final

import numpy as np
from jaxtyping import Shaped

POOLED_BYTES: Final = 256 * 1024
"""Smaller arrays come from numpy, which keeps them itself."""
KEPT_BYTES: Final = 512 * 1024**2
"""Free memory that is kept at most."""
_LARGEST_FIT: Final = 8
"""So many times larger than needed may a buffer be."""


class _Lease(np.ndarray):
    """Memory in use. Lies on no other array, so that numpy keeps it alive for as long as any array lies on it."""


class RowBuffers:
    """A pool of buffers, without locks: buffers come back while any thread runs, and a fork may happen at any time."""

    def __init__(self, *, kept_bytes: int = KEPT_BYTES) -> None:
        """Start empty."""
        self._kept_bytes = kept_bytes
        self._free: list[mmap.mmap] = []

    @property
    def free_bytes(self) -> int:
        """Memory that waits to be used again."""
        return sum(map(len, list(self._free)))

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Shaped[np.ndarray, "rows ..."]:
        """Return an array with any content; its memory is used again when no array or tensor shares it any more."""
        count = math.prod(shape)
        size = count * dtype.itemsize
        if size < POOLED_BYTES:
            return np.empty(shape, dtype=dtype)
        buffer = self._take(size)
        lease = _Lease(len(buffer), dtype=np.uint8, buffer=buffer)
        weakref.finalize(lease, self._give_back, buffer).atexit = False
        return np.frombuffer(lease, dtype=dtype, count=count).reshape(shape)

    def _take(self, size: int) -> mmap.mmap:
        # the one that came back last, if it will do, is the likeliest to be in the processor's cache
        for buffer in reversed(list(self._free)):
            if size <= len(buffer) <= _LARGEST_FIT * size:
                try:
                    self._free.remove(buffer)
                except ValueError:  # another thread took it
                    continue
                return buffer
        # a power of two serves many sizes; what lies beyond the rows is never touched and takes no memory
        buffer = mmap.mmap(-1, 1 << (size - 1).bit_length(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        buffer.madvise(mmap.MADV_HUGEPAGE)
        return buffer

    def _give_back(self, buffer: mmap.mmap) -> None:
        if self.free_bytes + len(buffer) <= self._kept_bytes:
            self._free.append(buffer)
