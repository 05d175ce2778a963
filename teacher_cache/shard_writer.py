"""Writes one shard: a Zarr v3 group, streamed sample by sample and never held in memory.

Rows go from the caller's arrays to the file without a copy; digests are computed while the kernel writes.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from blake3 import blake3
from crc32c import crc32c
from jaxtyping import Int, Shaped

from teacher_cache.codec import AXES, Axis, Field, Layout, stored_fields
from teacher_cache.config import Compression
from teacher_cache.durable_files import FileDigest, digest_bytes
from teacher_cache.row_codec import compress_chunk
from teacher_cache.storage import FileWriter, Store
from teacher_cache.zarr_format import CRC_BYTES, ArrayGeometry, array_metadata, group_metadata, object_name

OFFSETS = "offsets"

_FLUSH_BYTES = 8 * 1024**2


def offsets_field() -> Field:
    """Return the field of the table of offsets: the first row of each sample per ragged axis, and the totals."""
    return Field(tier="A", axis="tokens", dtype=np.dtype("<i8"), row_shape=(len(AXES),))


def checksum(rows: Shaped[np.ndarray, "rows ..."]) -> int:
    """Return the CRC-32C of the stored bytes of some rows."""
    return int(crc32c(_bytes_of(rows)))


class ShardWriter:
    """Appends samples to the arrays of one shard under ``folder``, a name that no other writer uses."""

    def __init__(self, store: Store, folder: str, *, layout: Layout) -> None:
        """Start a shard; its files come into being with their first rows."""
        self._store = store
        self._folder = folder
        self._fields = stored_fields(layout)
        self._background = ThreadPoolExecutor(max_workers=1)
        self._arrays = {
            name: _ArrayWriter(self, name, field=field, compression=layout.compression)
            for name, field in self._fields.items()
        }

    def append(self, arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Append one sample; return the CRC-32C of its rows by array."""
        for name, rows in arrays.items():
            self._arrays[name].append(rows)
        return {name: checksum(rows) for name, rows in arrays.items()}

    def finish(
        self, offsets: "Mapping[Axis, Int[np.ndarray, ' samples+1']]", *, attributes: dict[str, Any]
    ) -> dict[str, FileDigest]:
        """Complete all files, make them durable, and return their digests by path within the folder."""
        table = _ArrayWriter(self, OFFSETS, field=offsets_field(), compression="none")
        table.append(np.stack([offsets[axis] for axis in AXES], axis=1))
        files = {"zarr.json": self.write_file("zarr.json", group_metadata(attributes))}
        for array in self._arrays.values():
            files |= array.finish(attributes={})
        files |= table.finish(attributes={"columns": list(AXES)})
        self._store.sync(self._folder)
        return dict(sorted(files.items()))

    def open_file(self, name: str) -> FileWriter:
        """Start a file of the shard."""
        return self._store.writer(f"{self._folder}/{name}")

    def write_file(self, name: str, data: bytes) -> FileDigest:
        """Write a small file of the shard."""
        with self.open_file(name) as file:
            file.write([memoryview(data)])
        return digest_bytes(data)

    def write_hashed(self, file: FileWriter, hasher: blake3, buffers: list[memoryview]) -> None:
        """Write buffers and take them into the file's digest at the same time."""
        hashed = self._background.submit(_update, hasher, buffers)
        try:
            file.write(buffers)
        finally:
            hashed.result()

    def close(self) -> None:
        """Let go of files that were not completed."""
        for array in self._arrays.values():
            array.abort()
        self._background.shutdown()


class _ArrayWriter:
    """The object of one array: rows as they come, cut into chunks, then the index."""

    def __init__(self, shard: ShardWriter, name: str, *, field: Field, compression: Compression) -> None:
        self._shard = shard
        self._name = name
        self._geometry = ArrayGeometry(field=field, num_rows=0, compression=compression)
        self._num_rows = 0
        self._file: FileWriter | None = None
        self._hasher = blake3()
        self._size_bytes = 0
        self._pending: list[memoryview] = []
        self._pending_bytes = 0
        self._chunk_filled = 0
        self._chunk_crc = 0
        self._chunk_parts: list[memoryview] = []
        self._chunks: list[tuple[int, int]] = []

    def append(self, rows: Shaped[np.ndarray, "rows ..."]) -> None:
        self._num_rows += len(rows)
        data = _bytes_of(rows)
        while len(data):
            room = self._geometry.chunk_bytes - self._chunk_filled
            self._take(data[:room])
            data = data[room:]
        if self._pending_bytes >= _FLUSH_BYTES:
            self._flush()

    def finish(self, *, attributes: dict[str, Any]) -> dict[str, FileDigest]:
        geometry = ArrayGeometry(
            field=self._geometry.field, num_rows=self._num_rows, compression=self._geometry.compression
        )
        metadata = f"{self._name}/zarr.json"
        files = {metadata: self._shard.write_file(metadata, array_metadata(geometry, attributes=attributes))}
        if self._num_rows:
            if self._chunk_filled:
                self._take(memoryview(bytes(geometry.chunk_bytes - self._chunk_filled)))
            index = np.array(self._chunks, dtype="<u8").tobytes()
            self._put(memoryview(index + crc32c(index).to_bytes(CRC_BYTES, "little")))
            self._flush()
            assert self._file is not None
            self._file.close()
            digest = FileDigest(size_bytes=self._size_bytes, blake3=self._hasher.hexdigest())
            files[object_name(self._name, geometry)] = digest
        return files

    def abort(self) -> None:
        if self._file is not None:
            self._file.abort()

    def _take(self, part: memoryview) -> None:
        """Add bytes that fit the open chunk, and end it when it is full."""
        compressed = self._geometry.compression != "none"
        if compressed:
            self._chunk_parts.append(part)
        else:
            self._chunk_crc = crc32c(part, self._chunk_crc)
            self._put(part)
        self._chunk_filled += len(part)
        if self._chunk_filled < self._geometry.chunk_bytes:
            return
        if compressed:
            packed = compress_chunk(
                memoryview(b"".join(self._chunk_parts)), itemsize=self._geometry.field.dtype.itemsize
            )
            self._chunk_crc = crc32c(packed)
            self._put(memoryview(packed))
        start = self._chunks[-1][0] + self._chunks[-1][1] if self._chunks else 0
        self._put(memoryview(self._chunk_crc.to_bytes(CRC_BYTES, "little")))
        self._chunks.append((start, self._size_bytes - start))
        self._chunk_filled, self._chunk_crc, self._chunk_parts = 0, 0, []

    def _put(self, data: memoryview) -> None:
        self._pending.append(data)
        self._pending_bytes += len(data)
        self._size_bytes += len(data)

    def _flush(self) -> None:
        if self._file is None:
            geometry = ArrayGeometry(field=self._geometry.field, num_rows=1, compression=self._geometry.compression)
            self._file = self._shard.open_file(object_name(self._name, geometry))
        pending, self._pending, self._pending_bytes = self._pending, [], 0
        self._shard.write_hashed(self._file, self._hasher, pending)


def _update(hasher: blake3, buffers: list[memoryview]) -> None:
    for buffer in buffers:
        hasher.update(buffer)


def _bytes_of(rows: Shaped[np.ndarray, "rows ..."]) -> memoryview:
    # an array without elements cannot be cast to bytes
    return np.ascontiguousarray(rows).data.cast("B") if rows.size else memoryview(b"")
