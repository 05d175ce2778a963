"""Writing a shard, against writing the same bytes to one file per array and syncing them."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cache_bench.figures import Figure, ratio_figure
from cache_bench.rows import commit, make_samples, open_builder, plan_of
from cache_bench.settings import Settings
from teacher_cache.codec import encode_targets, layout_of
from teacher_cache.schema import TeacherTargets

SECTION = "write"
BAR = 0.80


def measure(settings: Settings) -> Iterator[Figure]:
    """Yield the speed of a durable, checksummed, committed shard."""
    samples = make_samples(settings.write_samples, shape=settings.shape, seed=1)
    arrays = stored_arrays(samples)
    size = sum(array.nbytes for sample in arrays for array in sample.values())
    folder = settings.folder / SECTION
    ids = [f"{sample.sample_id}-{pair}" for pair in range(settings.write_pairs + 1) for sample in samples]
    # one shard more than is written: the snapshot of a complete cache is no part of writing a shard
    plan = plan_of(ids, per_shard=len(samples))
    writer = open_builder(str(folder / "cache"), plan)
    raw_s, own_s, own_cpu_s = [], [], []
    for pair in range(settings.write_pairs):
        named = [
            replace(sample, sample_id=sample_id)
            for sample, sample_id in zip(samples, plan[pair].sample_ids, strict=True)
        ]
        for side in ("raw", "own") if pair % 2 else ("own", "raw"):
            os.sync()
            if side == "raw":
                raw_s.append(write_raw(folder / "raw", arrays))
                shutil.rmtree(folder / "raw")
            else:
                start, cpu = time.perf_counter(), time.process_time()
                record = commit(writer, plan[pair].shard_id, named)
                own_s.append(time.perf_counter() - start)
                own_cpu_s.append(time.process_time() - cpu)
                shutil.rmtree(folder / "cache" / record.folder)
    shutil.rmtree(folder)
    note = (
        f"{size / 1e6:.0f} MB; raw {size / np.median(raw_s) / 1e6:.0f} MB/s, shard {size / np.median(own_s) / 1e6:.0f} "
        f"MB/s at {np.median(own_cpu_s) / size * 1e9:.2f} CPU-s/GB"
    )
    yield ratio_figure(SECTION, "one shard, durable", base_s=raw_s, own_s=own_s, bar=BAR, note=note)


def stored_arrays(samples: Sequence[TeacherTargets]) -> list[dict[str, np.ndarray]]:
    """Return what is stored of each sample, as arrays."""
    layout = layout_of(samples[0], codec="exact", compression="none")
    return [encode_targets(sample, layout=layout, vocab_size=None) for sample in samples]


def write_raw(folder: Path, samples: Sequence[dict[str, np.ndarray]]) -> float:
    """Write the arrays of all samples, one file per array, durably; return how long it took."""
    folder.mkdir(parents=True)
    start = time.perf_counter()
    descriptors = {name: os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600) for name in samples[0]}
    for sample in samples:
        for name, rows in sample.items():
            data = rows.reshape(-1).view(np.uint8).data
            while data:
                data = data[os.write(descriptors[name], data) :]
    for descriptor in (*descriptors.values(), os.open(folder, os.O_RDONLY)):
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - start
