"""Writes one shard: a Zarr v3 group, streamed sample by sample and never held in memory.

Rows go from the caller's arrays to the file without a copy; digests are computed while the kernel writes.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
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
_BATCHES_AHEAD = 2
_PARALLEL_SYNCS = 4


def offsets_field() -> Field:
    """Return the field of the table of offsets: the first row of each sample per ragged axis, and the totals."""
    return Field(tier="A", axis="tokens", dtype=np.dtype("<i8"), row_shape=(len(AXES),))


def shard_metadata(geometries: Mapping[str, ArrayGeometry], *, attributes: dict[str, Any]) -> dict[str, bytes]:
    """Return the zarr.json of a shard's folder and of each of its arrays, by path."""
    columns = {OFFSETS: {"columns": list(AXES)}}
    arrays = {
        f"{name}/zarr.json": array_metadata(geometry, attributes=columns.get(name, {}))
        for name, geometry in geometries.items()
    }
    return {"zarr.json": group_metadata(attributes), **arrays}


def shard_attributes(*, fingerprint: str, shard_id: str, sample_ids: Sequence[str]) -> dict[str, Any]:
    """Return the attributes of a shard's folder."""
    return {
        "genrecal_fingerprint": fingerprint,
        "genrecal_shard_id": shard_id,
        "sample_ids": list(sample_ids),
    }


def checksum(rows: Shaped[np.ndarray, "rows ..."]) -> int:
    """Return the CRC-32C of the stored bytes of some rows."""
    return int(crc32c(_bytes_of(rows)))


class ShardWriter:
    """Appends samples to the arrays of one shard under ``folder``, a name that no other writer uses.

    A pipeline: the caller's thread checks and appends, a second one compresses and checksums batches, two more hash and
    write them. Appended arrays must not change until :meth:`finish`. Memory is bounded by two batches per array.
    """

    def __init__(self, store: Store, folder: str, *, layout: Layout) -> None:
        """Start a shard; its files come into being with their first rows."""
        self._store = store
        self._folder = folder
        self._encoding, self._hashing, self._writing = (
            ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"shard-{stage}")
            for stage in ("encode", "hash", "write")
        )
        self._arrays = {
            name: _ArrayWriter(self, name, field=field, compression=layout.compression)
            for name, field in stored_fields(layout).items()
        }
        self._files: list[FileWriter] = []

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
        for array in [*data, table]:
            array.end()
        metadata = shard_metadata({array.name: array.geometry for array in [*data, table]}, attributes=attributes)
        files = {name: self._write_file(name, content) for name, content in metadata.items()}
        for array in [*data, table]:
            files |= array.wait()
        with ThreadPoolExecutor(_PARALLEL_SYNCS) as pool:
            list(pool.map(lambda file: file.close(), self._files))
        self._store.sync(self._folder)
        checksums = np.array([array.checksums for array in data], dtype=np.uint32).T
        return WrittenShard(files=dict(sorted(files.items())), crc32c=checksums)

    def open_file(self, name: str) -> FileWriter:
        """Start a file of the shard, which :meth:`finish` closes."""
        file = self._store.writer(f"{self._folder}/{name}")
        self._files.append(file)
        return file

    def submit(
        self,
        encode: Callable[[], list[memoryview]],
        digest: Callable[[list[memoryview]], None],
        write: Callable[[list[memoryview]], None],
    ) -> "Future[None]":
        """Encode a batch, then hash and write it in the background, each in the order of the calls."""
        encoded = self._encoding.submit(encode)
        hashed = self._hashing.submit(lambda: digest(encoded.result()))

        def finish() -> None:
            write(encoded.result())
            hashed.result()

        return self._writing.submit(finish)

    def close(self) -> None:
        """Let go of files that were not completed."""
        for pool in (self._encoding, self._hashing, self._writing):
            pool.shutdown(cancel_futures=True)
        for file in self._files:
            file.abort()

    def _write_file(self, name: str, data: bytes) -> FileDigest:
        self.open_file(name).write([memoryview(data)])
        return digest_bytes(data)


@dataclass(frozen=True, kw_only=True)
class WrittenShard:
    """What a commit record says about the files of a shard."""

    files: dict[str, FileDigest]
    """By path within the shard's folder."""
    crc32c: UInt32[np.ndarray, "samples arrays"]


class _ArrayWriter:
    """The object of one array: rows as they come, cut into chunks, then the index."""

    def __init__(self, shard: ShardWriter, name: str, *, field: Field, compression: Compression) -> None:
        self.name = name
        self.geometry = ArrayGeometry(field=field, num_rows=0, compression=compression)
        self.checksums: list[int] = []
        self._shard = shard
        self._batch: list[memoryview] = []
        self._batch_bytes = 0
        self._writes: deque[Future[None]] = deque()
        # the encoding thread's
        self._chunk: list[memoryview] = []
        self._chunk_bytes = 0
        self._chunks: list[tuple[int, int]] = []
        # the hashing thread's
        self._hasher = blake3()
        self._size_bytes = 0
        # the writing thread's
        self._file: FileWriter | None = None

    def append(self, rows: Shaped[np.ndarray, "rows ..."]) -> None:
        self.geometry = replace(self.geometry, num_rows=self.geometry.num_rows + len(rows))
        data = _bytes_of(rows)
        self._batch.append(data)
        self._batch_bytes += len(data)
        if self._batch_bytes >= _BATCH_BYTES:
            self._submit_batch()

    def end(self) -> None:
        """Send off all that is left."""
        self._submit_batch()
        if self.geometry.num_rows:
            self._writes.append(self._shard.submit(self._encode_end, self._digest, self._write))

    def wait(self) -> dict[str, FileDigest]:
        """Return the digest of the object once it is written."""
        self._wait_for(pending=0)
        if not self.geometry.num_rows:
            return {}
        digest = FileDigest(size_bytes=self._size_bytes, blake3=self._hasher.hexdigest())
        return {object_name(self.name, self.geometry): digest}

    def _submit_batch(self) -> None:
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        self._wait_for(pending=_BATCHES_AHEAD - 1)
        self._writes.append(self._shard.submit(lambda: self._encode_batch(batch), self._digest, self._write))

    def _wait_for(self, *, pending: int) -> None:
        while len(self._writes) > pending:
            self._writes[0].result()  # a write that failed stays, so that its array can never be completed
            self._writes.popleft()

    def _write(self, buffers: list[memoryview]) -> None:
        if buffers:
            if self._file is None:
                self._file = self._shard.open_file(object_name(self.name, self.geometry))
            self._file.write(buffers)

    def _encode_batch(self, batch: list[memoryview]) -> list[memoryview]:
        encoded: list[memoryview] = []
        for data in batch:
            self.checksums.append(crc32c(data))
            while data:
                room = self.geometry.chunk_bytes - self._chunk_bytes
                part, data = data[:room], data[room:]
                self._chunk.append(part)
                self._chunk_bytes += len(part)
                if self._chunk_bytes == self.geometry.chunk_bytes:
                    encoded += self._end_chunk()
        return encoded

    def _encode_end(self) -> list[memoryview]:
        encoded: list[memoryview] = []
        if self._chunk_bytes:
            self._chunk.append(memoryview(bytes(self.geometry.chunk_bytes - self._chunk_bytes)))
            encoded += self._end_chunk()
        index = np.array(self._chunks, dtype="<u8").tobytes()
        return [*encoded, memoryview(index), _crc_bytes([memoryview(index)])]

    def _end_chunk(self) -> list[memoryview]:
        parts, self._chunk, self._chunk_bytes = self._chunk, [], 0
        if self.geometry.compression != "none":
            itemsize = self.geometry.field.dtype.itemsize
            parts = [memoryview(compress_chunk(memoryview(b"".join(parts)), itemsize=itemsize))]
        parts.append(_crc_bytes(parts))
        start = sum(self._chunks[-1]) if self._chunks else 0
        self._chunks.append((start, sum(map(len, parts))))
        return parts

    def _digest(self, buffers: list[memoryview]) -> None:
        for buffer in buffers:
            self._hasher.update(buffer)
            self._size_bytes += len(buffer)


def _crc_bytes(parts: Sequence[memoryview]) -> memoryview:
    crc = 0
    for part in parts:
        crc = crc32c(part, crc)
    return memoryview(crc.to_bytes(CRC_BYTES, "little"))


def _bytes_of(rows: Shaped[np.ndarray, "rows ..."]) -> memoryview:
    # an array without elements cannot be cast to bytes
    return np.ascontiguousarray(rows).data.cast("B") if rows.size else memoryview(b"")
