"""Digests and durable steps for folders of files that are not a cache's own: checkpoints and exports."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

_LOST_WRITES = (errno.EIO, errno.ENOSPC, errno.EDQUOT)
_SYNC_THREADS = 4
"""Per process, of which a machine with 8 GPUs has 8."""


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """Length and content of one file."""

    size_bytes: int
    blake3: str


def digest_bytes(data: bytes) -> FileDigest:
    """Return the digest of bytes in memory."""
    return FileDigest(size_bytes=len(data), blake3=blake3(data).hexdigest())


def digest_pieces(pieces: Iterable[bytes | memoryview]) -> FileDigest:
    """Return the digest of a file that is read in pieces."""
    hasher, size = blake3(), 0
    for piece in pieces:
        hasher.update(piece)
        size += len(piece)
    return FileDigest(size_bytes=size, blake3=hasher.hexdigest())


def digest_file(path: Path) -> FileDigest:
    """Return the digest of a local file, read in pieces."""
    with path.open("rb") as file:
        read: Callable[[], bytes] = lambda: file.read(1 << 20)  # noqa: E731
        return digest_pieces(iter(read, b""))


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the bytes of a file durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_names_above(path: Path) -> None:
    """Make the names durable that lead to a path, as far up as this process may look: others may have made them."""
    for folder in path.resolve().parents:
        try:
            sync_folder(folder)
        except OSError as error:
            if error.errno in _LOST_WRITES:  # others say that a folder is not for this process to sync
                raise


def replace_file(path: Path, data: bytes) -> None:
    """Give a file these bytes at once and durably, whatever it held; a crash leaves the old ones or the new ones."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def file_names(folder: Path) -> list[str]:
    """Return the relative path of every file under a folder."""
    return sorted(
        Path(parent, name).relative_to(folder).as_posix() for parent, _, names in os.walk(folder) for name in names
    )


def sync_files(folder: Path, names: Sequence[str]) -> dict[str, FileDigest]:
    """Make the bytes of files under a folder durable and return the digest of each; `sync_folders` has the names."""

    def sync(name: str) -> FileDigest:
        digest = digest_file(folder / name)
        sync_file(folder / name)
        return digest

    with ThreadPoolExecutor(_SYNC_THREADS) as pool:
        return dict(zip(names, pool.map(sync, names), strict=True))


def sync_folders(folder: Path) -> None:
    """Make the names of everything under a folder durable."""
    for parent, _, _ in os.walk(folder, topdown=False):
        sync_folder(Path(parent))


def sync_tree(folder: Path) -> dict[str, FileDigest]:
    """Make everything under a folder durable and return the digest of each file by relative path."""
    digests = sync_files(folder, file_names(folder))
    sync_folders(folder)
    return digests


def remove(path: Path) -> None:
    """Delete a file or folder; one that is already gone is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            path.unlink()
