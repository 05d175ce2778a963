"""Open files of a cache in an object store: ranged reads, uploads in parts."""

import errno
from collections.abc import Sequence
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any

import obstore

from teacher_cache.storage import TruncatedFile

if TYPE_CHECKING:
    from teacher_cache.object_store import ObjectStore

PART_BYTES = 16 * 1024**2
"""Bytes per request of an upload in parts."""
PARALLEL_PARTS = 4


class ObjectReader:
    """An object; each read is one ranged request."""

    def __init__(self, store: "ObjectStore", name: str) -> None:
        """Take a name; nothing is asked before the first read."""
        self._store = store
        self._name = name

    @cached_property
    def size_bytes(self) -> int:
        """Length of the object: one request, when it is asked for."""
        size = self._store.size(self._name)
        if size is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", self._store.path(self._name))
        return size

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers with the bytes from ``offset`` on."""
        wanted = sum(len(buffer) for buffer in buffers)
        if not wanted:
            return
        data = memoryview(self._store.get_range(self._name, offset=offset, length=wanted))
        if len(data) != wanted:
            raise TruncatedFile(errno.EIO, f"gave {len(data)} bytes of {wanted}", self._store.path(self._name))
        position = 0
        for buffer in buffers:
            buffer[:] = data[position : position + len(buffer)]
            position += len(buffer)

    def prefetch(self, offset: int, length: int) -> None:
        """Do nothing: a request ahead would be a request more."""


class ObjectWriter:
    """A new object, sent in parts while it is written; it comes into being when it is closed."""

    def __init__(self, store: "ObjectStore", name: str) -> None:
        """Start the upload with the first bytes."""
        self._store = store
        self._name = name
        self._upload: Any = None

    def write(self, buffers: Sequence[memoryview]) -> None:
        """Send the buffers."""
        if self._upload is None:
            self._upload = self._store.call(
                self._name,
                lambda client, path: obstore.open_writer(
                    client, path, buffer_size=PART_BYTES, max_concurrency=PARALLEL_PARTS
                ),
            )
        for buffer in buffers:
            self._store.call(self._name, lambda *_, buffer=buffer: self._upload.write(buffer))

    def close(self) -> None:
        """Finish the upload."""
        upload, self._upload = self._upload, None
        if upload is not None:
            self._store.call(self._name, lambda *_: upload.close())

    def abort(self) -> None:
        """Drop the upload: an object that was not finished does not exist.

        Its parts stay in the store until a lifecycle rule ends the upload: obstore's writer cannot.
        """
        self._upload = None

    def __enter__(self) -> "ObjectWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()
