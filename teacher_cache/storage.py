"""Where the files of a cache lie: one interface over a local folder and over an object store.

Names are relative, in ``/`` form: ``commits/shard-000000.0.json``. Nothing here knows what a cache holds.
Errors are those of the operating system: FileNotFoundError for a name that is absent, OSError for the rest.
"""

import os
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol
from urllib.parse import unquote, urlsplit

from teacher_cache.config import Sharing
from teacher_cache.errors import CacheCorrupt, ConfigError

DOCUMENT_LIMIT_BYTES = 2 * 1024**3
"""Longest file that is read whole."""
COPY_BYTES = 16 * 1024**2
"""Bytes per request when a whole object is read."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_OBJECT_SCHEMES = ("s3", "gs", "az", "memory")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}(/[A-Za-z0-9][A-Za-z0-9._-]{0,254}){0,7}")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a listing."""

    name: str
    """Relative to the cache."""
    size_bytes: int


class TruncatedFile(OSError):
    """A file that ends before the bytes that were asked for."""


class FileReader(Protocol):
    """An open file. May be shared by threads and used after a fork."""

    @property
    def size_bytes(self) -> int:
        """Length of the file."""

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers, one after the other, with the bytes from ``offset`` on, in one request.

        Raises:
            TruncatedFile: the file ends before.
            OSError: it cannot be read.
        """

    def prefetch(self, offset: int, length: int) -> None:
        """Say that these bytes will be read soon; may do nothing."""


class FileWriter(Protocol):
    """A new file that is being written, front to back."""

    def write(self, buffers: Sequence[memoryview]) -> None:
        """Append the buffers, one after the other."""

    def close(self) -> None:
        """Finish: the content is durable; the name is after :meth:`Store.sync`."""

    def abort(self) -> None:
        """Give up; what was written may stay under its name."""

    def __enter__(self) -> "FileWriter": ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, or abort when the block failed."""


class Store(Protocol):
    """The files of one cache. Pickles as its place; may be used after a fork."""

    @property
    def uri(self) -> str:
        """Where the files lie, as errors name it."""

    def read(self, name: str, *, limit_bytes: int = DOCUMENT_LIMIT_BYTES) -> bytes:
        """Return a whole file, refusing one that is longer before anything is allocated."""

    def size(self, name: str) -> int | None:
        """Return the length of a file, or None when there is no such file."""

    def create(self, name: str, data: bytes) -> bool:
        """Give a name that must be free these bytes, durably; say whether the name now holds exactly them.

        The bytes tell a win from a loss, not the answer of the store: after a lost answer a repeated request
        reports that the name is taken although it is ours. So racing contents must hold a nonce.
        """

    def create_content(self, name: str, data: bytes) -> bool:
        """Do as :meth:`create` for a name that says its content, whatever the length of the data.

        Whoever gives it bytes gives it the same ones, so writing needs no condition; no part of them is ever seen.
        """

    def replace(self, name: str, data: bytes) -> None:
        """Give a name these bytes at once, whatever it held; not durable."""

    def writer(self, name: str) -> FileWriter:
        """Start a new file, and the folders above it.

        Raises:
            FileExistsError: the name is taken.
        """

    def sync(self, folder: str) -> None:
        """Make the names of all closed files under a folder, and the folder's own, durable."""

    def open(self, name: str) -> FileReader:
        """Open a file for random access."""

    def list(self, folder: str) -> Iterator[FileEntry]:
        """Yield every file under a folder ("" for the cache itself), sorted by name; none when it is absent."""

    def folders(self, folder: str) -> tuple[str, ...]:
        """Return the names of the folders in a folder, sorted; none when it is absent."""

    def remove(self, name: str) -> None:
        """Delete a file, or a folder with everything under it; one that is already gone is fine."""


def open_store(uri: str, *, create: bool = False, sharing: Sharing = "private") -> Store:
    """Return the store at a path, a ``file://`` URI or an object-store URI; touches nothing unless ``create``.

    Args:
        uri: ``/path``, ``file:///path``, ``s3://bucket/prefix``, ``gs://…``, ``az://…`` or, in tests, ``memory://``.
            Credentials and endpoints come from the environment.
        create: Make the folder when there is none. New folders and files are readable by the owner alone, or by
            the group of the folder too.
        sharing: Who may read a folder that is made. An existing folder keeps its own setting, and files follow it.

    Raises:
        ConfigError: the URI cannot be used.
    """
    if (scheme := uri_scheme(uri)) in _OBJECT_SCHEMES:
        from teacher_cache.object_store import ObjectStore

        return ObjectStore(uri)
    from teacher_cache.local_store import LocalStore

    path = _local_path(uri, scheme=scheme)
    return LocalStore.create_folder(path, sharing=sharing) if create else LocalStore(path)


def require_create(store: Store) -> None:
    """Check that a store refuses to create a name twice, which commits rest on; what was written is removed.

    Raises:
        ConfigError: It takes the second one.
        OSError: It cannot be written.
    """
    name = f"staging/probe-{uuid.uuid4().hex}"
    try:
        won = [store.create(name, os.urandom(16)) for _ in range(2)]
    finally:
        store.remove(name)
    if won != [True, False]:
        raise ConfigError(f"{store.uri}: this store takes a second create of one name; caches need it refused")


def uri_scheme(uri: str) -> str | None:
    """Return the lower-case scheme of a URI, None for a plain path."""
    match = _SCHEME.match(uri)
    return match.group(1).lower() if match else None


def log_folder(uri: str) -> Path:
    """Return the folder beside a local cache, or in the working directory, where logs of its builds go."""
    if uri_scheme(uri) in _OBJECT_SCHEMES:
        return Path(f"{uri.rstrip('/').rsplit('/', 1)[-1]}-logs")
    path = _local_path(uri, scheme=uri_scheme(uri))
    return path.parent / f"{path.name}-logs"


def check_name(name: str) -> str:
    """Return a relative name of plain segments, so that no name ever leads out of a cache.

    Raises:
        CacheCorrupt: it has other characters, is absolute, or goes up.
    """
    if not _NAME.fullmatch(name):
        raise CacheCorrupt(f"{name!r} is no name of a file in a cache: expected plain segments joined by '/'")
    return name


def _local_path(uri: str, *, scheme: str | None) -> Path:
    if "\0" in uri or not uri:
        raise ConfigError(f"cache uri {uri!r}: expected a path, file:///path or s3://bucket/prefix")
    if scheme is None:
        return Path(uri)
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise ConfigError(f"cache uri {uri!r}: {error}") from error
    if scheme != "file" or parts.netloc not in ("", "localhost") or "%00" in parts.path:
        raise ConfigError(
            f"cache uri {uri!r}: scheme {scheme!r} is not supported; use a path, file:///path or one of "
            + ", ".join(f"{known}://" for known in _OBJECT_SCHEMES)
        )
    return Path(unquote(parts.path))
