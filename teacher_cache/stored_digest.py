"""Comparison of a stored file with the digest that was committed."""

from collections.abc import Iterable
from typing import IO, Final

from teacher_cache.durable_files import FileDigest, digest_pieces
from teacher_cache.errors import CacheCorrupt, CacheError
from teacher_cache.local_store import LocalStore
from teacher_cache.storage import COPY_BYTES, Store

_LOCAL_PIECE_BYTES: Final = 1024**2
"""Little enough that what was read is still in the processor's cache when it is hashed."""


def require_digest(store: Store, name: str, *, expected: FileDigest, where: str, copy: IO[bytes] | None = None) -> None:
    """Check that a file holds exactly the committed bytes; ``copy`` gets those that were checked.

    Raises:
        CacheCorrupt: it is missing or differs.
        CacheError: it cannot be read or copied.
    """
    path = f"{store.uri}/{name}"
    try:
        reader = store.open(name)
        if reader.size_bytes != expected.size_bytes:
            raise CacheCorrupt(f"{where}: {path} has {reader.size_bytes} bytes, {expected.size_bytes} were committed")
        step = _LOCAL_PIECE_BYTES if isinstance(store, LocalStore) else COPY_BYTES
        piece = bytearray(min(step, expected.size_bytes))

        def pieces() -> Iterable[memoryview]:
            for offset in range(0, expected.size_bytes, step):
                view = memoryview(piece)[: expected.size_bytes - offset]
                reader.read_into(offset, [view])
                if copy is not None:
                    copy.write(view)
                yield view

        found = digest_pieces(pieces())
        if copy is not None:
            copy.flush()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheCorrupt(f"{where}: {path} is missing, {expected.size_bytes} bytes were committed") from error
    except OSError as error:
        doing = f"read {path}" if copy is None else f"copy {path} to a temporary file"
        raise CacheError(f"{where}: cannot {doing}: {error}") from error
    if found != expected:
        raise CacheCorrupt(f"{where}: {path} was changed: blake3 {found.blake3}, {expected.blake3} was committed")
