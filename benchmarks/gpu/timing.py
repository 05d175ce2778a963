"""Seconds and peak memory of one call on a device."""

import statistics
import time
from collections.abc import Callable

import torch


def seconds(call: Callable[[], object], *, device: str, repeats: int) -> float:
    """Return the median duration, after one call that does not count."""
    durations = []
    for repeat in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        if repeat:
            durations.append(time.perf_counter() - start)
    return statistics.median(durations)


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """Return the peak of CUDA memory during a call, beside what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def wait(device: str) -> None:
    """Wait until the device is idle."""
    if device == "cuda":
        torch.cuda.synchronize()
