"""Reads shards with other Zarr libraries: ``python -m tests.teacher_cache.foreign_readers <library> <out> <shard>...``.

A process of its own, for the threads of tensorstore and zarrs do not survive the forks of other tests.
"""

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

PARTS = {"whole": slice(None), "middle": slice(1000, 1100)}
"""Rows that are read, by name."""


def read_with_zarr(array: Path, rows: slice) -> np.ndarray:
    """Read with zarr-python as it comes."""
    import zarr

    return np.asarray(zarr.open_array(array, mode="r")[rows])


def read_with_zarrs(array: Path, rows: slice) -> np.ndarray:
    """Read with the codecs of zarrs, and with no others."""
    import zarr

    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}):
        return np.asarray(zarr.open_array(array, mode="r")[rows])


def read_with_tensorstore(array: Path, rows: slice) -> np.ndarray:
    """Read with tensorstore, an absent chunk being an error."""
    import tensorstore

    source = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(array)},
        "fill_missing_data_reads": False,
    }
    opened = tensorstore.open(source, open=True, read=True).result()
    start, stop, _ = rows.indices(opened.shape[0])
    return np.asarray(opened[start:stop].read().result())


READERS: dict[str, Callable[[Path, slice], np.ndarray]] = {
    "zarr": read_with_zarr,
    "zarrs": read_with_zarrs,
    "tensorstore": read_with_tensorstore,
}

if __name__ == "__main__":
    library, out, *shards = sys.argv[1:]
    found: dict[str, np.ndarray] = {}
    for number, shard in enumerate(map(Path, shards)):
        for array in sorted(path.parent for path in shard.glob("*/zarr.json")):
            if any(array.glob("c.*")):
                for part, rows in PARTS.items():
                    found[f"{number}/{array.name}/{part}"] = READERS[library](array, rows)
    np.savez(out, allow_pickle=False, **found)
    print(version(library))
