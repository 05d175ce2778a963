"""One shard: a Zarr v3 group of ragged arrays, written whole by one writer and never changed.

Every sample's rows lie next to each other in every array; the array ``offsets`` says where. Each array
is one shard object of small checksummed chunks, so that a few rows can be read without the rest.
"""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Int, Shaped
from zarr.codecs import Crc32cCodec
from zarr.storage import LocalStore

from teacher_cache.codec import AXES, Axis, Field, Layout, stored_fields
from teacher_cache.errors import CacheCorrupt, CacheError
from teacher_cache.ledger import CommitRecord
from teacher_cache.storage import require_digest, require_size

OFFSETS = "offsets"

_CHUNK_BYTES = 512 * 1024
_MIN_CHUNK_ROWS, _MAX_CHUNK_ROWS = 16, 1024


def chunk_rows(row_bytes: int) -> int:
    """Return the rows per inner chunk: the power of two that fills 512 KiB, within 16 and 1,024."""
    fitting = max(_CHUNK_BYTES // max(row_bytes, 1), 1)
    return min(max(1 << (fitting.bit_length() - 1), _MIN_CHUNK_ROWS), _MAX_CHUNK_ROWS)


def checksum(rows: Shaped[np.ndarray, "rows ..."]) -> int:
    """Return the CRC-32 of the stored bytes of some rows."""
    return zlib.crc32(np.ascontiguousarray(rows).view(np.uint8).data)


def write_shard(
    folder: Path,
    samples: Sequence[Mapping[str, np.ndarray]],
    *,
    layout: Layout,
    offsets: "Mapping[Axis, Int[np.ndarray, ' samples+1']]",
    attributes: dict[str, Any],
) -> None:
    """Write the samples' arrays to a new folder. Nothing is durable before the caller syncs the folder."""
    group = zarr.create_group(store=LocalStore(folder), zarr_format=3, attributes=attributes)
    for name, field in stored_fields(layout).items():
        is_bfloat16 = field.dtype == np.dtype("<u2")
        rows = np.concatenate([sample[name] for sample in samples])
        _write_array(group, name, rows, attributes={"genrecal_dtype": "bfloat16"} if is_bfloat16 else {})
    table = np.stack([offsets[axis] for axis in AXES], axis=1)
    _write_array(group, OFFSETS, table, attributes={"columns": list(AXES)})


class ShardReader:
    """Reads rows of one committed shard. Holds no open file, so it may be shared by threads and forks."""

    def __init__(self, folder: Path, record: CommitRecord) -> None:
        """Check the length of every committed file, and the whole content of the metadata files.

        Raises:
            CacheCorrupt: a file is missing, of another length, or describes something else.
        """
        if record.layout is None:
            raise CacheCorrupt(f"shard {record.shard_id}: it holds no samples")
        self._folder = folder
        self._record = record
        self._layout = record.layout
        self._where = f"shard {record.shard_id}"
        self._offsets = record.samples.offsets()
        self._fields = stored_fields(record.layout)
        for path, expected in record.files.items():
            check = require_digest if Path(path).name == "zarr.json" else require_size
            check(self._path(path), expected=expected, where=self._where)
        self._arrays = {
            name: self._open(name, shape=(int(self._offsets[field.axis][-1]), *field.row_shape), field=field)
            for name, field in self._fields.items()
        }

    def read(self, samples: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
        """Yield the arrays of the samples at these positions of the commit record, checksums verified."""
        for sample in samples:
            yield {name: self._read_rows(name, sample) for name in self._fields}

    def read_offsets(self) -> Int[np.ndarray, "samples+1 5"]:
        """Return the stored table of offsets, which readers do not need: the commit record has it too."""
        shape = (len(self._record.samples.sample_id) + 1, len(AXES))
        field = Field(axis="tokens", dtype=np.dtype("<i8"), row_shape=(len(AXES),))
        array = self._open(OFFSETS, shape=shape, field=field)
        return self._slice(array, OFFSETS, 0, shape[0], sample_id=None)

    def _read_rows(self, name: str, sample: int) -> Shaped[np.ndarray, "rows ..."]:
        table = self._record.samples
        start, stop = self._offsets[self._fields[name].axis][sample : sample + 2]
        sample_id = table.sample_id[sample]
        rows = self._slice(self._arrays[name], name, int(start), int(stop), sample_id=sample_id)
        if checksum(rows) != table.crc32[name][sample]:
            raise self._corrupt(name, sample_id, "its rows differ from what was committed")
        return rows

    def _slice(
        self, array: zarr.Array, name: str, start: int, stop: int, *, sample_id: str | None
    ) -> Shaped[np.ndarray, "rows ..."]:
        if start == stop:
            return np.empty((0, *array.shape[1:]), dtype=array.dtype)
        try:
            return np.asarray(array[start:stop])
        except OSError as error:
            raise CacheError(f"{self._where}: cannot read {self._folder / name}: {error}") from error
        except Exception as error:
            raise self._corrupt(name, sample_id, f"{type(error).__name__}: {error}") from error

    def _open(self, name: str, *, shape: tuple[int, ...], field: Field) -> zarr.Array:
        path = self._path(f"{name}/zarr.json")
        self._require_sizes(name, shape=shape, field=field)
        try:
            metadata = json.loads(path.read_bytes())
            _check_metadata(metadata, shape=shape, field=field)
            return zarr.open_array(LocalStore(path.parent, read_only=True), mode="r", zarr_format=3)
        except Exception as error:
            raise CacheCorrupt(f"{self._where}: {path}: {type(error).__name__}: {error}") from error

    def _require_sizes(self, name: str, *, shape: tuple[int, ...], field: Field) -> None:
        files = self._record.files
        stored = "/".join([name, "c", *("0" for _ in shape)])
        found = files[stored].size_bytes if stored in files else 0
        if f"{name}/zarr.json" not in files or found != _object_bytes(shape[0], field.row_bytes):
            raise CacheCorrupt(
                f"{self._where}: its commit record gives {name} {shape[0]} rows and {found} bytes, "
                f"expected {_object_bytes(shape[0], field.row_bytes)} bytes"
            )

    def _path(self, relative: str) -> Path:
        if relative.startswith("/") or ".." in relative.split("/"):
            raise CacheCorrupt(f"{self._where}: its commit record names {relative!r}, which lies outside its folder")
        return self._folder / relative

    def _corrupt(self, name: str, sample_id: str | None, reason: str) -> CacheCorrupt:
        sample = "" if sample_id is None else f", sample {sample_id!r}"
        return CacheCorrupt(f"{self._where}{sample}: {self._folder / name} is damaged: {reason}")


def _write_array(
    group: zarr.Group, name: str, rows: Shaped[np.ndarray, "rows ..."], *, attributes: dict[str, Any]
) -> None:
    chunk, padded = _chunking(rows.shape[0], rows.dtype.itemsize * int(np.prod(rows.shape[1:], dtype=np.int64)))
    array = group.create_array(
        name,
        shape=rows.shape,
        dtype=rows.dtype,
        chunks=(chunk, *rows.shape[1:]),
        shards=(padded, *rows.shape[1:]),
        compressors=[Crc32cCodec()],
        fill_value=0,
        attributes=attributes,
        config={"write_empty_chunks": True},
    )
    if len(rows):
        array[...] = rows


def _chunking(num_rows: int, row_bytes: int) -> tuple[int, int]:
    chunk = chunk_rows(row_bytes)
    return chunk, max(-(-num_rows // chunk), 1) * chunk


def _object_bytes(num_rows: int, row_bytes: int) -> int:
    """Length of a shard object: per chunk its rows, a CRC and an index entry; at the end the index's CRC."""
    if num_rows == 0:
        return 0
    chunk, padded = _chunking(num_rows, row_bytes)
    return padded * row_bytes + padded // chunk * (4 + 16) + 4


def _check_metadata(metadata: dict[str, Any], *, shape: tuple[int, ...], field: Field) -> None:
    chunk, padded = _chunking(shape[0], field.row_bytes)
    sharding = metadata["codecs"][0]["configuration"]
    found = {
        "zarr_format": metadata["zarr_format"],
        "node_type": metadata["node_type"],
        "shape": tuple(metadata["shape"]),
        "data_type": metadata["data_type"],
        "chunk_grid": tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"]),
        "chunk_shape": tuple(sharding["chunk_shape"]),
        "codecs": [[codec["name"] for codec in metadata["codecs"]], *_codec_names(sharding)],
    }
    expected = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": field.dtype.name,
        "chunk_grid": (padded, *shape[1:]),
        "chunk_shape": (chunk, *shape[1:]),
        "codecs": [["sharding_indexed"], ["bytes", "crc32c"], ["bytes", "crc32c"]],
    }
    if found != expected:
        raise ValueError(f"expected {expected}, found {found}")


def _codec_names(sharding: dict[str, Any]) -> list[list[str]]:
    return [[codec["name"] for codec in sharding[key]] for key in ("codecs", "index_codecs")]
