"""The page cache: throw files out of it, and look whether they are out."""

import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

_PROT_READ, _MAP_SHARED = 1, 1
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_FAILED = ctypes.c_void_p(-1).value


class FileSet:
    """Files that are dropped together."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Take files that were synced: dirty pages stay."""
        self._paths = [path for path in paths if path.is_file()]

    @classmethod
    def under(cls, folder: Path) -> "FileSet":
        return cls(sorted(folder.rglob("*")))

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._paths)

    def drop(self) -> None:
        """Have the kernel forget the files' clean pages."""
        for descriptor in self._opened():
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def warm(self) -> None:
        """Read everything once."""
        piece = bytearray(1 << 20)
        for descriptor in self._opened():
            offset = 0
            while found := os.preadv(descriptor, [piece], offset):
                offset += found

    def resident_share(self) -> float:
        """Return which share of the files' pages is in memory."""
        resident = total = 0
        for descriptor in self._opened():
            present, pages = _resident_pages(descriptor)
            resident, total = resident + present, total + pages
        return resident / max(total, 1)

    def _opened(self) -> Iterator[int]:
        for path in self._paths:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                yield descriptor
            finally:
                os.close(descriptor)


def sync_under(folder: Path) -> None:
    """Make all files and folders under a folder durable."""
    for parent, _, names in os.walk(folder, topdown=False):
        for path in [*(os.path.join(parent, name) for name in names), parent]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def _resident_pages(descriptor: int) -> tuple[int, int]:
    size = os.fstat(descriptor).st_size
    pages = -(-size // mmap.PAGESIZE)
    if not pages:
        return 0, 0
    address = _libc.mmap(None, size, _PROT_READ, _MAP_SHARED, descriptor, 0)
    if address == _FAILED:
        raise OSError(ctypes.get_errno(), "mmap")
    try:
        states = ctypes.create_string_buffer(pages)
        if _libc.mincore(address, size, states):
            raise OSError(ctypes.get_errno(), "mincore")
        return sum(state & 1 for state in states.raw), pages
    finally:
        _libc.munmap(address, size)
