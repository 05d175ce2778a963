"""What one step took: the parts of its time, its tokens and model FLOPs per second, memory."""

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch

from distill.batch import Batch
from distill.model_flops import ModelFlops
from distill.processes import Processes

Part = Literal["forward", "backward", "optimizer"]

GIB = 2**30
PEAK_BFLOAT16_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "H800": 989,
    "B200": 2250,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
}
"""Dense bfloat16 peak by a part of the device's name, from the vendor's data sheets; the first that fits counts."""


@dataclass
class StepClock:
    """Seconds of the parts of one step; on a GPU between events of its stream, since kernels run behind the calls."""

    device: torch.device
    began: float = field(default_factory=time.perf_counter)
    _seconds: dict[str, float] = field(default_factory=dict)
    _events: list[tuple[Part, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Count the block to a part of the step."""
        if self.device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            stop.record()
            self._events.append((name, start, stop))
            return
        entered = time.perf_counter()
        yield
        self._add(name, time.perf_counter() - entered)

    def read(self) -> dict[str, float]:
        """Return seconds by part, and of the step so far as ``step``; waits for the device."""
        if self._events:
            torch.cuda.synchronize(self.device)
        for name, start, stop in self._events:
            self._add(name, start.elapsed_time(stop) / 1e3)
        self._events.clear()
        return {**self._seconds, "step": time.perf_counter() - self.began}

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """What one process computed in a step."""

    samples: int
    tokens: int
    """Of the student's sequences, without padding and fillers."""
    grid: int
    """With them."""
    waited_s: float
    """For data."""
    flops: float
    """0 where the model's cannot be told."""


def step_work(batches: Sequence[Batch], *, flops: ModelFlops | None, waited_s: float) -> StepWork:
    """Return what a process's micro-batches of one step amount to."""
    return StepWork(
        samples=sum(len(batch.sample_ids) for batch in batches),
        tokens=sum(batch.num_tokens for batch in batches),
        grid=sum(batch.student.attention_mask.numel() for batch in batches),
        waited_s=waited_s,
        flops=0.0 if flops is None else sum(flops.of_batch(batch) for batch in batches),
    )


def throughput_metrics(
    work: StepWork, *, seconds: dict[str, float], processes: Processes, peak_tflops: float | None
) -> dict[str, float]:
    """Return the metrics of time, throughput and memory over all processes; every process calls this.

    Work is summed. Times and memory are those of the process with the most: the others wait for it.
    """
    memory = memory_gib(processes.device)
    seconds = {"wait": work.waited_s, **seconds}
    mine = [work.samples, work.tokens, work.grid, work.flops, *seconds.values(), *memory.values()]
    everyone = processes.gather(mine)
    samples, tokens, grid, flops = (sum(values[index] for values in everyone) for index in range(4))
    most = [max(values) for values in zip(*(values[4:] for values in everyone), strict=True)]
    slowest = dict(zip(seconds, most[: len(seconds)], strict=True))
    step_s = slowest["step"]
    metrics = {
        "throughput/tokens_per_s": tokens / step_s,
        "throughput/tokens_per_s_per_process": tokens / step_s / processes.world_size,
        "throughput/samples_per_s": samples / step_s,
    }
    if flops:
        tflops_per_s = flops / step_s / processes.world_size / 1e12
        metrics["throughput/tflops_per_s"] = tflops_per_s
        if peak_tflops is not None:
            metrics["throughput/mfu"] = tflops_per_s / peak_tflops
    return {
        **metrics,
        "data/wait_fraction": slowest["wait"] / step_s,
        "data/padding_fraction": 1 - tokens / max(grid, 1),
        **{f"time/{part}_s": value for part, value in slowest.items() if part != "wait"},
        **dict(zip(memory, most[len(seconds) :], strict=True)),
    }


def memory_gib(device: torch.device) -> dict[str, float]:
    """Return the peak memory of this process so far, in GiB, and on a GPU of the device since the last call."""
    # Linux counts in KiB
    memory = {"memory/peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}
    if device.type == "cuda":
        memory["memory/peak_allocated_gib"] = torch.cuda.max_memory_allocated(device) / GIB
        memory["memory/peak_reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
        torch.cuda.reset_peak_memory_stats(device)
    return memory


def peak_tflops(device: torch.device, *, dtype: str) -> float | None:
    """Return the device's dense peak in bfloat16, or None where it is not known or the student computes otherwise."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    return known_peak_tflops(torch.cuda.get_device_name(device))


def known_peak_tflops(device_name: str) -> float | None:
    """Return the dense bfloat16 peak of a device by its name, or None."""
    return next((peak for name, peak in PEAK_BFLOAT16_TFLOPS.items() if name in device_name), None)
