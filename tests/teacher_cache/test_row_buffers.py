import gc
import threading

import numpy as np
import pytest
import torch

from teacher_cache.row_buffers import POOLED_BYTES, RowBuffers

FLOAT = np.dtype("<f4")
ROWS = POOLED_BYTES // 4 // 16
"""Of 16 elements, as many as the smallest buffer takes."""


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_is_used_again_only_when_nobody_shares_it() -> None:
    buffers = RowBuffers()
    first = buffers.empty((2 * ROWS, 16), FLOAT)
    place = address(first)
    first[:] = 7
    tensor = torch.from_numpy(first)[3:5].view(torch.int32)  # the last that shares the memory
    del first
    gc.collect()
    second = buffers.empty((2 * ROWS, 16), FLOAT)
    assert address(second) != place
    second[:] = 8
    assert tensor.view(torch.float32).eq(7).all()
    del tensor
    gc.collect()
    assert address(buffers.empty((2 * ROWS - 9, 16), FLOAT)) == place, "a little smaller fits the same buffer"


@pytest.mark.parametrize("size", [POOLED_BYTES, POOLED_BYTES + 4, 3 * POOLED_BYTES + 4, 2**24 - 4, 2**24, 2**24 + 4])
def test_arrays_of_any_size_are_whole(size: int) -> None:
    buffers = RowBuffers()
    array = buffers.empty((size // 4,), FLOAT)
    assert (array.shape, array.dtype, array.flags.writeable) == ((size // 4,), FLOAT, True)
    array[-1] = 5
    del array
    gc.collect()
    assert size <= buffers.free_bytes < 2 * size


def test_no_more_is_kept_than_allowed_and_small_arrays_not_at_all() -> None:
    buffers = RowBuffers(kept_bytes=3 * POOLED_BYTES)
    held = [buffers.empty((ROWS, 16), FLOAT) for _ in range(5)]
    small = buffers.empty((4, 16), FLOAT)
    del held, small
    gc.collect()
    assert buffers.free_bytes == 3 * POOLED_BYTES


def test_threads_never_share_a_buffer() -> None:
    buffers, mixed = RowBuffers(), []

    def work(number: int) -> None:
        for _ in range(200):
            array = buffers.empty((ROWS, 16), FLOAT)
            array[:] = number
            if not (array == number).all():
                mixed.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mixed == []
