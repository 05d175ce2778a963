"""Reads rows of one committed shard: one ranged request per array, straight into the result."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from crc32c import crc32c
from jaxtyping import Int, Shaped

from teacher_cache.codec import Axis, Layout, stored_fields
from teacher_cache.errors import CacheCorrupt, CacheError
from teacher_cache.row_buffers import RowBuffers
from teacher_cache.row_codec import decompress_chunk
from teacher_cache.shard_writer import OFFSETS, checksum, offsets_field
from teacher_cache.storage import FileReader, Store, TruncatedFile
from teacher_cache.zarr_format import CRC_BYTES, INDEX_ENTRY_BYTES, ArrayGeometry, object_name

_TRUSTED_BYTES = 256 * 1024**2
_BUFFERS = RowBuffers()


@dataclass(frozen=True, kw_only=True)
class RowRange:
    """The rows of one sample in one array."""

    sample_id: str
    start: int
    stop: int
    crc32c: int | None
    """What the stored bytes must give; None to take them as they are."""


class ShardReader:
    """Random access to the arrays of one shard. May be shared by threads and used after a fork."""

    def __init__(
        self, store: Store, folder: str, *, shard_id: str, layout: Layout, num_rows: Mapping[Axis, int], samples: int
    ) -> None:
        """Take what the commit record says; nothing is opened before its first use."""
        self._store = store
        self._folder = folder
        self._shard_id = shard_id
        geometries = {
            name: ArrayGeometry(field=field, num_rows=num_rows[field.axis], compression=layout.compression)
            for name, field in stored_fields(layout).items()
        }
        offsets = ArrayGeometry(field=offsets_field(), num_rows=samples + 1, compression="none")
        self._geometries = {**geometries, OFFSETS: offsets}
        self._files: dict[str, FileReader] = {}
        self._chunks: dict[str, Int[np.ndarray, "chunks 2"]] = {}

    def prefetch(self, name: str, rows: RowRange) -> None:
        """Have the kernel read ahead what :meth:`read` will ask for; problems show then."""
        geometry = self._geometries[name]
        if rows.start == rows.stop or geometry.compression != "none":
            return
        try:
            offset, stop = (_stored_position(geometry, row) for row in (rows.start, rows.stop))
            self._file(name).prefetch(offset, stop - offset)
        except OSError:
            return

    def read(self, name: str, rows: RowRange) -> Shaped[np.ndarray, "rows ..."]:
        """Return the rows of one sample in a new array.

        Raises:
            CacheCorrupt: the file is missing or too short, or its bytes are not what was committed.
            CacheError: it cannot be read.
        """
        geometry = self._geometries[name]
        shape = (rows.stop - rows.start, *geometry.field.row_shape)
        result = np.empty(0, dtype=geometry.field.dtype).reshape(0, *shape[1:])
        if shape[0]:
            try:
                self._require_present(name, rows)
                result = _BUFFERS.empty(shape, geometry.field.dtype)
                self._read_into(name, rows.start, result.reshape(-1).data.cast("B"))
            except (FileNotFoundError, NotADirectoryError, TruncatedFile, ValueError) as error:
                raise self._corrupt(name, rows.sample_id, f"{type(error).__name__}: {error}") from error
            except MemoryError as error:
                path, sample = self._path(name), _of_sample(rows.sample_id)
                raise CacheError(f"shard {self._shard_id}{sample}: {path}: no memory for {shape[0]} rows") from error
            except OSError as error:
                path, sample = self._path(name), _of_sample(rows.sample_id)
                raise CacheError(f"shard {self._shard_id}{sample}: cannot read {path}: {error}") from error
        if rows.crc32c is not None and checksum(result) != rows.crc32c:
            raise self._corrupt(name, rows.sample_id, "its rows differ from what was committed")
        return result

    def read_offsets(self) -> Int[np.ndarray, "samples+1 5"]:
        """Return the stored table of offsets, which other Zarr readers use."""
        stop = self._geometries[OFFSETS].num_rows
        return self.read(OFFSETS, RowRange(sample_id="", start=0, stop=stop, crc32c=None))

    def _require_present(self, name: str, rows: RowRange) -> None:
        """Refuse a claim of very many rows that the file cannot hold, before memory is taken for them."""
        geometry = self._geometries[name]
        if geometry.compression != "none":
            self._chunk_index(name)  # as long as the number of rows asks for
            return
        if (rows.stop - rows.start) * geometry.field.row_bytes <= _TRUSTED_BYTES:
            return
        size, needed = self._file(name).size_bytes, _stored_position(geometry, rows.stop)
        if size < needed:
            raise TruncatedFile(f"has {size} bytes, {needed} are needed")

    def _read_into(self, name: str, start_row: int, out: memoryview) -> None:
        geometry = self._geometries[name]
        first = start_row * geometry.field.row_bytes
        if geometry.compression != "none":
            self._read_compressed(name, first, out)
            return
        gap, buffers, position = memoryview(bytearray(CRC_BYTES)), [], 0
        while position < len(out):
            room = geometry.chunk_bytes - (first + position) % geometry.chunk_bytes
            buffers += [out[position : position + room], gap]
            position += room
        self._file(name).read_into(_stored_position(geometry, start_row), buffers[:-1])

    def _read_compressed(self, name: str, first: int, out: memoryview) -> None:
        geometry = self._geometries[name]
        chunks = self._chunk_index(name)
        low, high = first // geometry.chunk_bytes, -(-(first + len(out)) // geometry.chunk_bytes)
        begin, end = int(chunks[low, 0]), int(chunks[high - 1].sum())
        packed = memoryview(bytearray(end - begin))
        self._file(name).read_into(begin, [packed])
        scratch = memoryview(bytearray(geometry.chunk_bytes))
        for number in range(low, high):
            offset, length = int(chunks[number, 0]) - begin, int(chunks[number, 1])
            body, crc = packed[offset : offset + length - CRC_BYTES], packed[offset + length - CRC_BYTES :][:CRC_BYTES]
            if crc32c(body) != int.from_bytes(crc, "little"):
                raise ValueError(f"chunk {number} does not match its checksum")
            position = number * geometry.chunk_bytes - first
            if 0 <= position <= len(out) - geometry.chunk_bytes:
                decompress_chunk(body, out=out[position : position + geometry.chunk_bytes])
            else:
                decompress_chunk(body, out=scratch)
                target = out[max(position, 0) : position + geometry.chunk_bytes]
                target[:] = scratch[max(-position, 0) :][: len(target)]

    def _chunk_index(self, name: str) -> Int[np.ndarray, "chunks 2"]:
        if name not in self._chunks:
            geometry, file = self._geometries[name], self._file(name)
            offset = file.size_bytes - geometry.index_bytes
            if offset < 0:
                raise TruncatedFile(f"has {file.size_bytes} bytes, its index alone has {geometry.index_bytes}")
            data = bytearray(geometry.index_bytes)
            file.read_into(offset, [memoryview(data)])
            body, crc = bytes(data[:-CRC_BYTES]), int.from_bytes(data[-CRC_BYTES:], "little")
            chunks = np.frombuffer(body, dtype="<u8").reshape(-1, INDEX_ENTRY_BYTES // 8).astype(np.int64)
            ends = np.concatenate([[0], np.cumsum(chunks[:, 1])])
            if crc32c(body) != crc or not np.array_equal(chunks[:, 0], ends[:-1]) or ends[-1] != offset:
                raise ValueError("the index of its chunks is damaged")
            if int(chunks[:, 1].min()) <= CRC_BYTES:
                raise ValueError("the index of its chunks names an empty chunk")
            self._chunks[name] = chunks
        return self._chunks[name]

    def _file(self, name: str) -> FileReader:
        file = self._files.get(name)
        if file is None:
            # without a lock: a thread that holds one during a fork would leave it held in the child
            opened = self._store.open(f"{self._folder}/{object_name(name, self._geometries[name])}")
            file = self._files.setdefault(name, opened)
        return file

    def _corrupt(self, name: str, sample_id: str, reason: str) -> CacheCorrupt:
        return CacheCorrupt(
            f"shard {self._shard_id}{_of_sample(sample_id)}: {self._path(name)} is damaged: {reason}; run "
            "`genrecal cache verify`, then `genrecal cache repair`"
        )

    def _path(self, name: str) -> str:
        return f"{self._store.uri}/{self._folder}/{object_name(name, self._geometries[name])}"


def _of_sample(sample_id: str) -> str:
    return f", sample {sample_id!r}" if sample_id else ""


def _stored_position(geometry: ArrayGeometry, row: int) -> int:
    """Return where a row begins in the object of an array that is not compressed."""
    position = row * geometry.field.row_bytes
    return position + position // geometry.chunk_bytes * CRC_BYTES
