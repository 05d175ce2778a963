"""A full verification, against reading every byte and hashing it."""

import shutil
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blake3 import blake3

from cache_bench.figures import Figure, ratio_figure
from cache_bench.page_cache import FileSet
from cache_bench.rows import build_cache, make_samples
from cache_bench.settings import Settings
from teacher_cache.verify import verify_cache

SECTION = "verify"
BAR = 0.8
_THREADS = 4
_PIECE_BYTES = 1 << 20


def measure(settings: Settings) -> Iterator[Figure]:
    """Yield the speed of ``verify``, cold and warm, against hashing on one thread and on as many as it uses."""
    folder = settings.folder / SECTION
    samples = make_samples(settings.read_samples, shape=settings.shape, seed=4)
    build_cache(str(folder), samples, per_shard=settings.read_samples // 4)
    files = FileSet.under(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for cold in (True, False):
        seconds: dict[int, list[float]] = {0: [], 1: [], _THREADS: []}
        for pair in range(settings.verify_pairs):
            for threads in sorted(seconds, reverse=bool(pair % 2)):
                files.drop() if cold else files.warm()
                start = time.perf_counter()
                if threads:
                    _hash_all(paths, threads=threads)
                elif not verify_cache(str(folder)).ok:
                    raise RuntimeError(f"{folder} was damaged while it was measured")
                seconds[threads].append(time.perf_counter() - start)
        for threads in (1, _THREADS):
            speed = files.size_bytes / statistics.median(seconds[threads]) / 1e6
            yield ratio_figure(
                SECTION,
                f"{'cold' if cold else 'warm'}, against hashing on {threads} thread{'s' if threads > 1 else ''}",
                base_s=seconds[threads],
                own_s=seconds[0],
                bar=BAR,
                note=f"hashing {speed:.0f} MB/s",
            )
    shutil.rmtree(folder)


def _hash_all(paths: list[Path], *, threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(_hash, sorted(paths, key=lambda path: -path.stat().st_size)))


def _hash(path: Path) -> None:
    hasher, piece = blake3(), bytearray(_PIECE_BYTES)
    view = memoryview(piece)
    with path.open("rb", buffering=0) as file:
        while found := file.readinto(piece):
            hasher.update(view[:found])
    hasher.hexdigest()
