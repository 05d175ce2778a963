"""Files that are mapped into memory: those of a local cache, or temporary copies of objects, checked either way."""

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

from teacher_cache.durable_files import FileDigest
from teacher_cache.errors import CacheError
from teacher_cache.local_store import LocalStore
from teacher_cache.storage import Store, check_name
from teacher_cache.stored_digest import require_digest


@contextmanager
def checked_file(store: Store, name: str, *, expected: FileDigest, where: str) -> Iterator[Path]:
    """Give the path of a file that holds exactly the committed bytes.

    An object is read once: the bytes that are compared are those of the copy.

    Raises:
        CacheCorrupt: it is missing or differs.
        CacheError: it cannot be read or copied.
    """
    if isinstance(store, LocalStore):
        require_digest(store, name, expected=expected, where=where)
        yield store.path(name)
        return
    check_name(name)  # before anything is made for it
    with _temporary_file(f"{store.uri}/{name}", where=where) as copy:
        require_digest(store, name, expected=expected, where=where, copy=copy)
        yield Path(copy.name)


def _temporary_file(path: str, *, where: str) -> AbstractContextManager[IO[bytes]]:
    try:
        return tempfile.NamedTemporaryFile(prefix="genrecal-")
    except OSError as error:  # one of them is that no folder for temporary files is found
        raise CacheError(f"{where}: no temporary file for {path} can be made: {error}") from error
