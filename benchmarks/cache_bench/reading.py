"""Random reads of whole samples, against pread of the same byte ranges into memory that is reused."""

import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import numpy as np

from cache_bench.figures import Figure, ratio_figure
from cache_bench.page_cache import FileSet
from cache_bench.rows import build_cache, byte_ranges, make_samples
from cache_bench.settings import Settings
from teacher_cache.reader import open_cache

SECTION = "read"
Side = Literal["pread", "verified", "unverified"]

_START_AHEAD_S = 0.003
_COLD_SHARE = 0.01


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to read."""

    cold: bool
    processes: int
    threads: int
    batched: bool
    bars: dict[Side, float]

    @property
    def name(self) -> str:
        parts = [
            "cold" if self.cold else "warm",
            f"{self.processes} process{'es' if self.processes > 1 else ''}",
            f"{self.threads} thread{'s' if self.threads > 1 else ''}",
            "batches" if self.batched else "one sample per call",
        ]
        return ", ".join(parts)


WARM_BARS: dict[Side, float] = {"verified": 0.50, "unverified": 0.75}
CASES = (
    Case(cold=True, processes=1, threads=1, batched=False, bars={"verified": 0.65}),
    Case(cold=True, processes=1, threads=1, batched=True, bars={"verified": 0.65}),
    Case(cold=True, processes=1, threads=4, batched=True, bars={"verified": 0.90}),
    Case(cold=True, processes=2, threads=1, batched=True, bars={"verified": 0.65}),
    Case(cold=True, processes=2, threads=4, batched=True, bars={"verified": 0.90}),
    Case(cold=False, processes=1, threads=1, batched=False, bars=WARM_BARS),
    Case(cold=False, processes=1, threads=4, batched=True, bars=WARM_BARS),
    Case(cold=False, processes=2, threads=1, batched=True, bars=WARM_BARS),
)


class SampleReader:
    """Both sides: the cache, and pread of its byte ranges."""

    def __init__(self, folder: Path) -> None:
        self._cache = open_cache(str(folder))
        ranges = byte_ranges(folder)
        descriptors: dict[Path, int] = {}
        for path in {part.path for parts in ranges.values() for part in parts}:
            descriptors[path] = os.open(path, os.O_RDONLY)
        self._ranges = {
            sample_id: [(descriptors[part.path], part.offset, part.length) for part in parts]
            for sample_id, parts in ranges.items()
        }
        self._buffer_bytes = max(sum(part.length for part in parts) for parts in ranges.values())
        self._own = threading.local()
        self._pools: dict[int, ThreadPoolExecutor] = {}

    @property
    def sample_ids(self) -> tuple[str, ...]:
        return self._cache.sample_ids

    def bytes_of(self, sample_id: str) -> int:
        return sum(length for _, _, length in self._ranges[sample_id])

    def run(self, side: Side, sample_ids: Sequence[str], *, threads: int, start_at: float) -> tuple[float, float]:
        """Read the samples; return when that began and ended, by the monotonic clock."""
        while time.monotonic() < start_at:
            pass
        start = time.monotonic()
        if side != "pread":
            self._cache.read(sample_ids, verify=side == "verified", threads=threads)
        elif threads == 1:
            for sample_id in sample_ids:
                self._pread(sample_id)
        else:
            pool = self._pools.setdefault(threads, ThreadPoolExecutor(threads))
            list(pool.map(self._pread, sample_ids))
        return start, time.monotonic()

    def _pread(self, sample_id: str) -> None:
        buffer: memoryview | None = getattr(self._own, "buffer", None)
        if buffer is None:
            buffer = self._own.buffer = np.ones(self._buffer_bytes, dtype=np.uint8).data
        position = 0
        for descriptor, offset, length in self._ranges[sample_id]:
            stop = position + length
            while position < stop:
                found = os.preadv(descriptor, [buffer[position:stop]], offset)
                position, offset = position + found, offset + found


def measure(settings: Settings) -> Iterator[Figure]:
    """Yield the speed of every case, and how the files were made cold."""
    folder = settings.folder / SECTION
    samples = make_samples(settings.read_samples, shape=settings.shape, seed=2)
    build_cache(str(folder), samples, per_shard=settings.read_samples // 2)
    files = FileSet.under(folder / "shards")
    reader = SampleReader(folder)
    coldness = _coldness(files, reader)
    yield coldness
    can_be_cold = coldness.value is not None and coldness.value < _COLD_SHARE
    for case in CASES:
        if case.cold and not can_be_cold:
            note = "this file system keeps files in memory"
            yield Figure(section=SECTION, name=f"{case.name}, verified", value=None, note=note)
        else:
            yield from _measure_case(case, settings=settings, folder=folder, files=files, reader=reader)
    shutil.rmtree(folder)


def _coldness(files: FileSet, reader: SampleReader) -> Figure:
    files.warm()
    warm = files.resident_share()
    files.drop()
    cold = files.resident_share()
    reader.run("pread", reader.sample_ids, threads=1, start_at=0)
    note = f"after dropping them; {warm:.3f} before, {files.resident_share():.3f} after reading all samples"
    return Figure(section=SECTION, name="share of the files in memory when cold", value=cold, unit="", note=note)


def _measure_case(
    case: Case, *, settings: Settings, folder: Path, files: FileSet, reader: SampleReader
) -> Iterator[Figure]:
    sides: list[Side] = ["pread", "verified", "unverified"]
    per_call = settings.batch if case.batched else 1
    rng = np.random.default_rng(3)
    seconds: dict[Side, list[float]] = {side: [] for side in sides}
    speed = []
    with _runner(case, folder=folder, reader=reader) as run:
        run("pread", reader.sample_ids[:2])
        run("verified", reader.sample_ids[:2])
        files.warm()
        for _ in range(settings.read_passes * case.processes * (4 if case.batched else 1)):
            order = rng.permutation(reader.sample_ids).tolist()
            step = per_call * case.processes
            for start in range(0, len(order) - step + 1, step):
                chosen = order[start : start + step]
                for side in rng.permutation(sides).tolist():
                    if case.cold:
                        files.drop()
                    seconds[side].append(run(side, chosen))
                speed.append(sum(map(reader.bytes_of, chosen)) / seconds["pread"][-1] / 1e6)
    for side in sides[1:]:
        note = f"pread {np.median(speed):.0f} MB/s"
        yield ratio_figure(
            SECTION,
            f"{case.name}, {side}",
            base_s=seconds["pread"],
            own_s=seconds[side],
            bar=case.bars.get(side),
            note=note,
        )


@contextmanager
def _runner(case: Case, *, folder: Path, reader: SampleReader):  # type: ignore[no-untyped-def]
    """Give a function that reads samples, spread over the processes, and returns the seconds from first to last."""
    if case.processes == 1:

        def run_here(side: Side, sample_ids: Sequence[str]) -> float:
            start, stop = reader.run(side, sample_ids, threads=case.threads, start_at=0)
            return stop - start

        yield run_here
        return
    context = multiprocessing.get_context("spawn")
    pipes, workers = [], []
    for _ in range(case.processes):
        ours, theirs = context.Pipe()
        worker = context.Process(target=_serve, args=(folder, theirs), daemon=True)
        worker.start()
        pipes.append(ours)
        workers.append(worker)
    for pipe in pipes:
        pipe.recv()

    def run(side: Side, sample_ids: Sequence[str]) -> float:
        start_at = time.monotonic() + _START_AHEAD_S
        for number, pipe in enumerate(pipes):
            pipe.send((side, sample_ids[number :: case.processes], case.threads, start_at))
        times = [pipe.recv() for pipe in pipes]
        return max(stop for _, stop in times) - min(start for start, _ in times)

    yield run
    for pipe in pipes:
        pipe.send(None)
    for worker in workers:
        worker.join()


def _serve(folder: Path, pipe: Connection) -> None:
    reader = SampleReader(folder)
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        side, sample_ids, threads, start_at = job
        pipe.send(reader.run(side, sample_ids, threads=threads, start_at=start_at))
