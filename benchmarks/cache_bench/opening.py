"""Opening a cache of a million samples in a fresh process: seconds, and memory that it takes."""

import multiprocessing
import shutil
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from cache_bench.figures import Figure, quartiles
from cache_bench.page_cache import FileSet, sync_under
from cache_bench.rows import open_builder, plan_of
from cache_bench.settings import Settings
from teacher_cache.codec import Layout, stored_fields
from teacher_cache.durable_files import digest_bytes
from teacher_cache.ledger import CommitRecord, SampleRows
from teacher_cache.plan import PlannedShard
from teacher_cache.snapshot import publish_snapshot
from teacher_cache.zarr_format import ArrayGeometry, object_name

SECTION = "open"
BAR_S, BAR_MIB = 1.0, 200.0
_RUNS = 5
_TOKENS, _ANSWER_TOKENS = 1450, 200


def measure(settings: Settings) -> Iterator[Figure]:
    """Yield the cost of opening, for each number of samples per shard."""
    folder = settings.folder / SECTION
    for per_shard in settings.open_per_shard:
        build_records(folder, samples=settings.open_samples, per_shard=per_shard)
        sync_under(folder)
        files = FileSet.under(folder)
        runs = []
        for _ in range(_RUNS):
            files.drop()
            runs.append(_in_fresh_process(folder))
        name = f"{settings.open_samples:,} samples, {per_shard} per shard"
        index_mb = sum(path.stat().st_size for path in (folder / "index").iterdir()) / 1e6
        ids_s, ids_mib = np.median([run["ids_s"] for run in runs]), np.median([run["ids_mib"] for run in runs])
        notes = {
            "open_s": f"index of {index_mb:.0f} MB, not in memory before",
            "open_mib": f"of which {np.median([run['anonymous_mib'] for run in runs]):.0f} MiB are not mapped files; "
            f"all ids as a tuple: {ids_s:.2f} s and {ids_mib:.0f} MiB more",
        }
        for key, what, unit, bar in (("open_s", "time", "s", BAR_S), ("open_mib", "peak memory", "MiB", BAR_MIB)):
            low, middle, high = quartiles([run[key] for run in runs])
            yield Figure(
                section=SECTION,
                name=f"{name}: {what}",
                value=middle,
                unit=unit,
                bar=bar,
                at_most=True,
                low=low,
                high=high,
                pairs=_RUNS,
                note=notes[key],
            )
        shutil.rmtree(folder)


def build_records(folder: Path, *, samples: int, per_shard: int) -> None:
    """Make a complete cache that has everything but the tensors."""
    plan = plan_of([f"conversation/{number:09}" for number in range(samples)], per_shard=per_shard)
    writer = open_builder(str(folder), plan)
    (folder / "commits").mkdir(exist_ok=True)
    rng = np.random.default_rng(6)
    for shard in plan:
        record = _record(shard, fingerprint=writer.fingerprint, rng=rng)
        (folder / record.name).write_bytes(record.encode())
    if publish_snapshot(writer.store, manifest=writer.manifest) is None:
        raise RuntimeError(f"{folder} is not complete")


def _record(shard: PlannedShard, *, fingerprint: str, rng: np.random.Generator) -> CommitRecord:
    layout = Layout(dtype="bfloat16", codec="exact", compression="none", hidden_size=8192, topk=64)
    fields = stored_fields(layout)
    count = len(shard.sample_ids)
    rows = SampleRows(
        counts=np.tile(
            np.array([[_TOKENS, 1, _ANSWER_TOKENS, _TOKENS - _ANSWER_TOKENS - 1]], dtype=np.int32), (count, 1)
        ),
        spans=np.tile(np.array([[_TOKENS - _ANSWER_TOKENS, _TOKENS]], dtype=np.int32), (count, 1)),
        crc32c=rng.integers(0, 2**32, (count, len(fields)), dtype=np.uint32),
    )
    names = {"zarr.json"}
    for name, field in fields.items():
        geometry = ArrayGeometry(field=field, num_rows=int(rows.offsets[field.axis][-1]), compression="none")
        names |= {f"{name}/zarr.json", object_name(name, geometry)}
    return CommitRecord(
        shard_id=shard.shard_id,
        attempt=rng.bytes(16).hex(),
        fingerprint=fingerprint,
        sample_ids=shard.sample_ids,
        rows=rows,
        skipped=(),
        layout=layout,
        files={name: digest_bytes(f"{shard.shard_id}/{name}".encode()) for name in sorted(names)},
        provenance={},
    )


def _in_fresh_process(folder: Path) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_open, args=(folder, theirs))
    process.start()
    theirs.close()
    result: dict[str, float] = ours.recv()
    process.join()
    return result


def _open(folder: Path, pipe: Connection) -> None:
    from teacher_cache.reader import open_cache

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = _memory()
    start = time.perf_counter()
    cache = open_cache(str(folder))
    opened = time.perf_counter()
    after = _memory()
    ids = cache.sample_ids
    listed = time.perf_counter()
    known = cache.num_tokens(ids[len(ids) // 2])
    if known != _TOKENS:
        raise RuntimeError(f"{folder}: a sample has {known} tokens")
    pipe.send(
        {
            "open_s": opened - start,
            "open_mib": (after["VmHWM"] - before["VmRSS"]) / 1024,
            "anonymous_mib": (after["RssAnon"] - before["RssAnon"]) / 1024,
            "ids_s": listed - opened,
            "ids_mib": (_memory()["VmRSS"] - after["VmRSS"]) / 1024,
        }
    )


def _memory() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) for name in ("VmHWM", "VmRSS", "RssAnon")}
