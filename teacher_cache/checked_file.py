"""Files that are mapped into memory: those of a local cache, or temporary copies of objects, checked either way."""

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import IO

from teacher_cache.durable_files import FileDigest, digest_pieces
from teacher_cache.errors import CacheCorrupt, CacheError
from teacher_cache.local_store import LocalStore
from teacher_cache.storage import COPY_BYTES, FileReader, Store
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
    path = f"{store.uri}/{name}"
    with ExitStack() as stack:
        try:
            reader = store.open(name)
            if reader.size_bytes != expected.size_bytes:
                raise CacheCorrupt(
                    f"{where}: {path} has {reader.size_bytes} bytes, {expected.size_bytes} were committed"
                )
            copy = stack.enter_context(_temporary_file(path, where=where))
            found = digest_pieces(_copied(reader, copy))
            copy.flush()
        except FileNotFoundError as error:
            raise CacheCorrupt(f"{where}: {path} is missing, {expected.size_bytes} bytes were committed") from error
        except OSError as error:
            raise CacheError(f"{where}: cannot copy {path} to a temporary file: {error}") from error
        if found != expected:
            raise CacheCorrupt(f"{where}: {path} was changed: blake3 {found.blake3}, {expected.blake3} was committed")
        yield Path(copy.name)


def _temporary_file(path: str, *, where: str) -> AbstractContextManager[IO[bytes]]:
    try:
        return tempfile.NamedTemporaryFile(prefix="genrecal-")
    except OSError as error:  # one of them is that no folder for temporary files is found
        raise CacheError(f"{where}: no temporary file for {path} can be made: {error}") from error


def _copied(reader: FileReader, copy: IO[bytes]) -> Iterator[memoryview]:
    """Yield the pieces of a file, each after it was written to its copy."""
    for offset in range(0, reader.size_bytes, COPY_BYTES):
        piece = memoryview(bytearray(min(COPY_BYTES, reader.size_bytes - offset)))
        reader.read_into(offset, [piece])
        copy.write(piece)
        yield piece
