"""How one array of a shard lies in its file: a Zarr v3 array made of exactly one ``sharding_indexed`` object.

The object holds inner chunks of a fixed number of rows, each followed by its CRC-32C, then the index: offset and
length of every chunk (uint64 pairs) and the CRC-32C of the index.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from teacher_cache.codec import Field
from teacher_cache.config import Compression
from teacher_cache.row_codec import blosc_configuration

CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16

_CHUNK_BYTES = 512 * 1024
_MIN_CHUNK_ROWS, _MAX_CHUNK_ROWS = 16, 1024
_CRC32C: dict[str, Any] = {"name": "crc32c"}
_LITTLE_ENDIAN: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}


@dataclass(frozen=True, kw_only=True)
class ArrayGeometry:
    """Sizes of one stored array."""

    field: Field
    num_rows: int
    compression: Compression

    @cached_property
    def chunk_rows(self) -> int:
        """Rows per inner chunk: the power of two that fills 512 KiB, within 16 and 1,024."""
        fitting = max(_CHUNK_BYTES // max(self.field.row_bytes, 1), 1)
        return min(max(1 << (fitting.bit_length() - 1), _MIN_CHUNK_ROWS), _MAX_CHUNK_ROWS)

    @cached_property
    def chunk_bytes(self) -> int:
        """Length of a chunk's rows, without its checksum."""
        return self.chunk_rows * self.field.row_bytes

    @property
    def num_chunks(self) -> int:
        """Inner chunks of the object; the last one is filled up with zeros."""
        return -(-self.num_rows // self.chunk_rows)

    @property
    def index_bytes(self) -> int:
        """Length of the index and its checksum, at the end of the object."""
        return self.num_chunks * INDEX_ENTRY_BYTES + CRC_BYTES

    @property
    def object_bytes(self) -> int:
        """Length of the object of an array that is not compressed; 0 for an array without rows, which has none."""
        return self.num_chunks and self.num_chunks * (self.chunk_bytes + CRC_BYTES) + self.index_bytes

    @property
    def key(self) -> str:
        """Name of the object within the array's folder."""
        return ".".join(["c", *("0" for _ in (self.num_rows, *self.field.row_shape))])


def object_name(name: str, geometry: ArrayGeometry) -> str:
    """Return the path of an array's object within the shard's folder."""
    return f"{name}/{geometry.key}"


def group_metadata(attributes: dict[str, Any]) -> bytes:
    """Return the zarr.json of a shard's folder."""
    return _encode({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def array_metadata(geometry: ArrayGeometry, *, attributes: dict[str, Any]) -> bytes:
    """Return the zarr.json of an array."""
    field, chunk = geometry.field, geometry.chunk_rows
    inner = [_LITTLE_ENDIAN, _CRC32C]
    if geometry.compression == "zstd":
        blosc = blosc_configuration(itemsize=field.dtype.itemsize, chunk_bytes=geometry.chunk_bytes)
        inner.insert(1, {"name": "blosc", "configuration": blosc})
    sharding = {
        "chunk_shape": [chunk, *field.row_shape],
        "codecs": inner,
        "index_codecs": [_LITTLE_ENDIAN, _CRC32C],
        "index_location": "end",
    }
    grid = {"chunk_shape": [max(geometry.num_chunks, 1) * chunk, *field.row_shape]}
    if field.float_type is not None:
        attributes = {**attributes, "genrecal_dtype": field.float_type}
    return _encode(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [geometry.num_rows, *field.row_shape],
            "data_type": field.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": grid},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": 0.0 if np.issubdtype(field.dtype, np.floating) else 0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": attributes,
        }
    )


def _encode(metadata: dict[str, Any]) -> bytes:
    return json.dumps(metadata, indent=1).encode()
