"""Writes one shard: a Zarr v3 group, streamed sample by sample and never held in memory.

Rows go from the caller's arrays to the file without a copy; digests are computed while the kernel writes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from blake3 import blake3
from crc32c import crc32c
from jaxtyping import Int, Shaped, UInt32

from teacher_cache.codec import AXES, Axis, Field, Layout, stored_fields
from teacher_cache.config import Compression
from teacher_cache.durable_files import FileDigest, digest_bytes
from teacher_cache.row_codec import compress_chunk
from teacher_cache.storage import FileWriter, Store
from teacher_cache.zarr_format import CRC_BYTES, ArrayGeometry, array_metadata, group_metadata, object_name

OFFSETS = "offsets"

_BATCH_BYTES = 8 * 1024**2
_PARALLEL_SYNCS = 4


def offsets_field() -> Field:
    """Return the field of the table of offsets: the first row of each sample per ragged axis, and the totals."""
    return Field(tier="A", axis="tokens", dtype=np.dtype("<i8"), row_shape=(len(AXES),))


def checksum(rows: Shaped[np.ndarray, "rows ..."]) -> int:
    """Return the CRC-32C of the stored bytes of some rows."""
    return int(crc32c(_bytes_of(rows)))


class ShardWriter:
    """Appends samples to the arrays of one shard under ``folder``, a name that no other writer uses.

    Works as a pipeline of two: while the kernel takes one batch of an array, a thread checksums, compresses and hashes
    the next. Appended arrays must not change until :meth:`finish`.
    """

    def __init__(self, store: Store, folder: str, *, layout: Layout) -> None:
        """Start a shard; its files come into being with their first rows."""
        self._store = store
        self._folder = folder
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shard-digests")
        self._arrays = {
            name: _ArrayWriter(self, name, field=field, compression=layout.compression)
            for name, field in stored_fields(layout).items()
        }

    def append(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Append one sample."""
        for name, rows in arrays.items():
            self._arrays[name].append(rows)

    def finish(
        self, offsets: "Mapping[Axis, Int[np.ndarray, ' samples+1']]", *, attributes: dict[str, Any]
    ) -> "WrittenShard":
        """Complete all files and make them durable."""
        table = _ArrayWriter(self, OFFSETS, field=offsets_field(), compression="none")
        table.append(np.stack([offsets[axis] for axis in AXES], axis=1))
        data = list(self._arrays.values())
        files = {"zarr.json": self.write_file("zarr.json", group_metadata(attributes))}
        for array in [*data, table]:
            files |= array.finish(attributes={"columns": list(AXES)} if array is table else {})
        with ThreadPoolExecutor(_PARALLEL_SYNCS) as pool:
            list(pool.map(_ArrayWriter.close, [*data, table]))
        self._store.sync(self._folder)
        checksums = np.array([array.checksums for array in data], dtype=np.uint32).T
        return WrittenShard(files=dict(sorted(files.items())), crc32c=checksums)

    def open_file(self, name: str) -> FileWriter:
        """Start a file of the shard."""
        return self._store.writer(f"{self._folder}/{name}")

    def write_file(self, name: str, data: bytes) -> FileDigest:
        """Write a small file of the shard."""
        with self.open_file(name) as file:
            file.write([memoryview(data)])
        return digest_bytes(data)

    def submit(self, work: Callable[[], list[memoryview]]) -> "Future[list[memoryview]]":
        """Do work of one array in the background, in the order of the calls."""
        return self._background.submit(work)

    def close(self) -> None:
        """Let go of files that were not completed."""
        for array in self._arrays.values():
            array.abort()
        self._background.shutdown()


@dataclass(frozen=True, kw_only=True)
class WrittenShard:
    """What a commit record says about the files of a shard."""

    files: dict[str, FileDigest]
    """By path within the shard's folder."""
    crc32c: UInt32[np.ndarray, "samples arrays"]


class _ArrayWriter:
    """The object of one array: rows as they come, cut into chunks, then the index."""

    def __init__(self, shard: ShardWriter, name: str, *, field: Field, compression: Compression) -> None:
        self.checksums: list[int] = []
        self._shard = shard
        self._name = name
        self._geometry = ArrayGeometry(field=field, num_rows=0, compression=compression)
        self._num_rows = 0
        self._file: FileWriter | None = None
        self._batch: list[memoryview] = []
        self._batch_bytes = 0
        self._ahead: Future[list[memoryview]] | None = None
        # what follows belongs to the background
        self._hasher = blake3()
        self._size_bytes = 0
        self._chunk: list[memoryview] = []
        self._chunk_bytes = 0
        self._chunks: list[tuple[int, int]] = []

    def append(self, rows: Shaped[np.ndarray, "rows ..."]) -> None:
        self._num_rows += len(rows)
        data = _bytes_of(rows)
        self._batch.append(data)
        self._batch_bytes += len(data)
        if self._batch_bytes >= _BATCH_BYTES:
            self._write_batch()

    def finish(self, *, attributes: dict[str, Any]) -> dict[str, FileDigest]:
        """Write all that is left; the file still has to be closed."""
        self._write_batch()
        geometry = replace(self._geometry, num_rows=self._num_rows)
        metadata = f"{self._name}/zarr.json"
        files = {metadata: self._shard.write_file(metadata, array_metadata(geometry, attributes=attributes))}
        if self._num_rows:
            self._advance(self._shard.submit(self._encode_end))
            self._advance(None)
            digest = FileDigest(size_bytes=self._size_bytes, blake3=self._hasher.hexdigest())
            files[object_name(self._name, geometry)] = digest
        return files

    def close(self) -> None:
        """Make the file durable."""
        if self._file is not None:
            self._file.close()

    def abort(self) -> None:
        if self._file is not None:
            self._file.abort()

    def _write_batch(self) -> None:
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        self._advance(self._shard.submit(lambda: self._encode_batch(batch)))

    def _advance(self, coming: "Future[list[memoryview]] | None") -> None:
        """Write the batch that was encoded before, while the coming one is."""
        encoded, self._ahead = self._ahead, coming
        buffers = [] if encoded is None else encoded.result()
        if buffers:
            if self._file is None:
                self._file = self._shard.open_file(object_name(self._name, replace(self._geometry, num_rows=1)))
            self._file.write(buffers)

    def _encode_batch(self, batch: list[memoryview]) -> list[memoryview]:
        encoded: list[memoryview] = []
        for data in batch:
            self.checksums.append(crc32c(data))
            for start in self._cuts(len(data)):
                part = data[start : start + self._geometry.chunk_bytes - self._chunk_bytes]
                self._chunk.append(part)
                self._chunk_bytes += len(part)
                if self._chunk_bytes == self._geometry.chunk_bytes:
                    encoded += self._end_chunk()
        return self._hash(encoded)

    def _cuts(self, length: int) -> Iterator[int]:
        start = 0
        while start < length:
            room = self._geometry.chunk_bytes - self._chunk_bytes
            yield start
            start += room

    def _encode_end(self) -> list[memoryview]:
        encoded: list[memoryview] = []
        if self._chunk_bytes:
            self._chunk.append(memoryview(bytes(self._geometry.chunk_bytes - self._chunk_bytes)))
            encoded += self._end_chunk()
        index = np.array(self._chunks, dtype="<u8").tobytes()
        return self._hash([*encoded, memoryview(index), _crc_bytes([memoryview(index)])])

    def _end_chunk(self) -> list[memoryview]:
        parts, self._chunk, self._chunk_bytes = self._chunk, [], 0
        if self._geometry.compression != "none":
            itemsize = self._geometry.field.dtype.itemsize
            parts = [memoryview(compress_chunk(memoryview(b"".join(parts)), itemsize=itemsize))]
        parts.append(_crc_bytes(parts))
        start = sum(self._chunks[-1]) if self._chunks else 0
        self._chunks.append((start, sum(map(len, parts))))
        return parts

    def _hash(self, encoded: list[memoryview]) -> list[memoryview]:
        for buffer in encoded:
            self._hasher.update(buffer)
            self._size_bytes += len(buffer)
        return encoded


def _crc_bytes(parts: Sequence[memoryview]) -> memoryview:
    crc = 0
    for part in parts:
        crc = crc32c(part, crc)
    return memoryview(crc.to_bytes(CRC_BYTES, "little"))


def _bytes_of(rows: Shaped[np.ndarray, "rows ..."]) -> memoryview:
    # an array without elements cannot be cast to bytes
    return np.ascontiguousarray(rows).data.cast("B") if rows.size else memoryview(b"")
