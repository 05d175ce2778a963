"""A shard written from rows in device memory, read back and compared, against the same from host memory."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from cache_bench.figures import Figure, ratio_figure
from cache_bench.rows import Shape, build_cache, make_samples
from timing import wait

from teacher_cache import open_cache
from teacher_cache.schema import TeacherTargets

FULL = Shape(hidden=8192, topk=64, mean_tokens=960)
QUICK = Shape(hidden=64, topk=4, mean_tokens=100)


def measure(*, device: str, quick: bool, folder: Path) -> Iterator[Figure]:
    """Yield whether the rows come back, and the speed."""
    samples = make_samples(3 if quick else 24, shape=QUICK if quick else FULL)
    on_device = [_moved(sample, device) for sample in samples]
    host_s, device_s = [], []
    for pair in range(2 if quick else 4):
        for side, given in (("host", samples), ("device", on_device)):
            wait(device)
            start = time.perf_counter()
            _write(folder / f"{side}-{pair}", given)
            (host_s if side == "host" else device_s).append(time.perf_counter() - start)
    stored = open_cache(str(folder / "device-0")).read([sample.sample_id for sample in samples])
    equal = sum(
        torch.equal(found.hidden_states, sample.hidden_states) for found, sample in zip(stored, samples, strict=True)
    )
    yield Figure(
        section="shards check",
        name="samples that come back bit for bit",
        value=equal / len(samples),
        unit="of all",
        bar=1,
        note=f"{len(samples)} samples",
    )
    size = sum(rows.nbytes for sample in samples for rows in (sample.hidden_states, sample.question_hidden_states))
    yield ratio_figure(
        "shards",
        "a cache of one shard, from device memory against from host memory",
        base_s=host_s[1:],
        own_s=device_s[1:],
        note=f"{size / 1e6:.0f} MB of rows, {size / min(device_s) / 1e6:.0f} MB/s",
    )


def _write(folder: Path, samples: Sequence[TeacherTargets]) -> None:
    build_cache(str(folder), [_moved(sample, "cpu") for sample in samples], per_shard=len(samples))


def _moved(sample: TeacherTargets, device: str) -> TeacherTargets:
    rows = {name: getattr(sample, name).to(device) for name in ("hidden_states", "question_hidden_states")}
    return replace(sample, **rows)
