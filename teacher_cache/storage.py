"""Durable steps on a local file system: what the commit protocol is made of.

Nothing here knows what a cache holds. The names of the folder picture are in docs/format.md.
"""

import hashlib
import os
import re
import shutil
import stat
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from teacher_cache.errors import CacheCorrupt, CacheError, ConfigError

MANIFEST = "CACHE.json"
SEAL = "SEAL.json"
COMMITS = "commits"
SHARDS = "shards"
STAGING = "staging"

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """Length and content of one file."""

    size_bytes: int
    sha256: str


def local_root(uri: str) -> Path:
    """Return the folder that ``uri`` names: a plain path or a ``file://`` URI.

    Raises:
        ConfigError: the URI has another scheme or host.
    """
    if not _SCHEME.match(uri):
        if not uri or "\0" in uri:
            raise ConfigError(f"cache uri {uri!r}: expected a path or a file:// URI")
        return Path(uri)
    parts = urlsplit(uri)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise ConfigError(f"cache uri {uri!r}: only local paths and file:/// URIs are supported; use one of them")
    return Path(unquote(parts.path))


def read_committed(path: Path, *, where: str) -> bytes:
    """Return the bytes of a file that must exist.

    Raises:
        CacheCorrupt: it is missing.
        CacheError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheCorrupt(f"{where}: {path} is missing; restore it or build the cache again") from error
    except OSError as error:
        raise CacheError(f"{where}: cannot read {path}: {error}") from error


def digest_bytes(data: bytes) -> FileDigest:
    """Return the digest of bytes in memory."""
    return FileDigest(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def digest_file(path: Path) -> FileDigest:
    """Return the digest of a file, read in pieces."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileDigest(size_bytes=file.tell(), sha256=digest)


def require_size(path: Path, *, expected: FileDigest, where: str) -> None:
    """Check that a regular file of the committed length exists, without opening it.

    Raises:
        CacheCorrupt: it is missing, of another length, or no regular file.
        CacheError: it cannot be looked at.
    """
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheCorrupt(f"{where}: {path} is missing, {expected.size_bytes} bytes were committed") from error
    except OSError as error:
        raise CacheError(f"{where}: cannot read {path}: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CacheCorrupt(f"{where}: {path} is no regular file")
    if status.st_size != expected.size_bytes:
        raise CacheCorrupt(f"{where}: {path} has {status.st_size} bytes, {expected.size_bytes} were committed")


def require_digest(path: Path, *, expected: FileDigest, where: str) -> None:
    """Check that a file holds exactly the committed bytes.

    Raises:
        CacheCorrupt: it is missing or differs.
        CacheError: it cannot be read.
    """
    require_size(path, expected=expected, where=where)
    try:
        found = digest_file(path)
    except OSError as error:
        raise CacheError(f"{where}: cannot read {path}: {error}") from error
    if found != expected:
        raise CacheCorrupt(f"{where}: {path} was changed: sha256 {found.sha256}, {expected.sha256} was committed")


def make_folder(path: Path) -> None:
    """Create a folder and the missing ones above it, durably."""
    if not path.parent.is_dir():
        make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> dict[str, FileDigest]:
    """Make everything under a folder durable and return the digest of each file by relative path."""
    digests = {}
    for parent, _, names in os.walk(folder, topdown=False):
        for name in sorted(names):
            path = Path(parent, name)
            digests[path.relative_to(folder).as_posix()] = digest_file(path)
            _sync_file(path)
        sync_folder(Path(parent))
    return dict(sorted(digests.items()))


def publish(source: Path, target: Path) -> bool:
    """Give a finished file its final name, which must be free, and say whether this call did so.

    The bytes at ``target`` tell a win from a loss, not the answer of the file system: after a lost answer a
    repeated ``link`` reports that the name exists although it is ours. So contents must hold a nonce.
    """
    try:
        _sync_file(source)
        try:
            os.link(source, target)
            won = True
        except FileExistsError:
            won = target.read_bytes() == source.read_bytes()
        sync_folder(target.parent)
    finally:
        source.unlink(missing_ok=True)
    return won


def publish_bytes(data: bytes, target: Path, *, staging: Path) -> bool:
    """Write ``data`` to a temporary file and :func:`publish` it."""
    source = staging / f"{target.name}.{uuid.uuid4().hex}"
    with source.open("xb") as file:
        file.write(data)
    return publish(source, target)


def move_folder(source: Path, target: Path) -> None:
    """Rename a finished folder durably."""
    source.rename(target)
    sync_folder(target.parent)


def remove(path: Path) -> None:
    """Delete a file or folder; one that is already gone is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            path.unlink()


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
