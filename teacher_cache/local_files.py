"""Open files of a local cache: vectored reads and writes, durable when closed."""

import errno
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from teacher_cache.storage import TruncatedFile

_MAX_BUFFERS = 512


class LocalReader:
    """An open local file. Reads name their position, so threads and forks share it freely."""

    def __init__(self, path: Path) -> None:
        """Open a regular file that is no link."""
        self._path = path
        self._descriptor = _open_regular(path)
        self.size_bytes = os.fstat(self._descriptor).st_size

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers with the bytes from ``offset`` on."""
        try:
            for start in range(0, len(buffers), _MAX_BUFFERS):
                group = buffers[start : start + _MAX_BUFFERS]
                wanted = sum(len(buffer) for buffer in group)
                found = os.preadv(self._descriptor, group, offset)
                if found != wanted:
                    self._finish(group, offset, done=found)
                offset += wanted
        except OSError as error:
            name_error(error, self._path)
            raise

    def prefetch(self, offset: int, length: int) -> None:
        """Ask the kernel to read ahead."""
        os.posix_fadvise(self._descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # ``close`` is bound here because the module's names may be gone when the interpreter ends
        if hasattr(self, "_descriptor"):
            close(self._descriptor)

    def _finish(self, buffers: Sequence[memoryview], offset: int, *, done: int) -> None:
        for buffer in buffers:
            filled = min(done, len(buffer))
            done -= filled
            while filled < len(buffer):
                found = os.preadv(self._descriptor, [buffer[filled:]], offset + filled)
                if not found:
                    raise TruncatedFile(errno.EIO, f"ends at byte {offset + filled}", str(self._path))
                filled += found
            offset += len(buffer)


class LocalWriter:
    """A new local file."""

    def __init__(self, path: Path, *, mode: int) -> None:
        """Create the file, which must not exist."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._path = path
        self._descriptor = os.open(path, flags, mode)
        if mode & 0o077:
            os.fchmod(self._descriptor, mode)  # whatever the umask has taken away
        self._written = 0

    def write(self, buffers: Sequence[memoryview]) -> None:
        """Append the buffers and have the kernel start to store them."""
        start = self._written
        try:
            for first in range(0, len(buffers), _MAX_BUFFERS):
                group = buffers[first : first + _MAX_BUFFERS]
                found = os.writev(self._descriptor, group)
                self._written += found
                _write_rest(self._descriptor, group, done=found)
                self._written += sum(len(buffer) for buffer in group) - found
        except OSError as error:
            wanted = start + sum(len(buffer) for buffer in buffers)
            name_error(error, self._path, doing=f"writing bytes {self._written} to {wanted}")
            raise
        # on Linux this starts the write-back of dirty pages, so that the sync at the end finds little to do
        os.posix_fadvise(self._descriptor, start, self._written - start, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Make the content durable."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            try:
                os.fsync(descriptor)
            except OSError as error:
                name_error(error, self._path, doing=f"storing {self._written} bytes")
                raise
            finally:
                os.close(descriptor)

    def abort(self) -> None:
        """Leave the file as it is."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> "LocalWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def name_error(error: OSError, path: Path, *, doing: str = "") -> None:
    """Put into an error what calls on a descriptor leave out: the file, and what was done to it."""
    error.filename = str(path)
    if doing:
        error.strerror = f"{error.strerror}, {doing}"


def _open_regular(path: Path) -> int:
    # without O_NONBLOCK a pipe under this name would block for ever
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return descriptor


def _write_rest(descriptor: int, buffers: Sequence[memoryview], *, done: int) -> None:
    for buffer in buffers:
        skip = min(done, len(buffer))
        done -= skip
        while skip < len(buffer):
            skip += os.write(descriptor, buffer[skip:])
