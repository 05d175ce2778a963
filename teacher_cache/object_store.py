"""A cache in an object store: S3 and what speaks like it, Google Cloud Storage, Azure. Knows obstore, alone.

Every object is written once, so durability needs no more than the store's own answer; a commit is a conditional put.
"""

import errno
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any, TypeVar

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotFoundError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
)

from teacher_cache.errors import CacheError, ConfigError
from teacher_cache.object_client import TIMEOUT_S, connect, is_forked, plain_message
from teacher_cache.object_service import ObjectService
from teacher_cache.storage import DOCUMENT_LIMIT_BYTES, FileEntry, TruncatedFile, check_name, uri_scheme

T = TypeVar("T")

_PART_BYTES = 16 * 1024**2
_PARALLEL_PARTS = 4
_CREATE_ATTEMPTS = 5
_LIST_ATTEMPTS = 5
_PAUSE_S = 0.2


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
        self._written = 0

    def write(self, buffers: Sequence[memoryview]) -> None:
        """Send the buffers."""
        if self._upload is None:
            self._upload = self._store.call(
                self._name,
                lambda client, path: obstore.open_writer(
                    client, path, buffer_size=_PART_BYTES, max_concurrency=_PARALLEL_PARTS
                ),
            )
        for buffer in buffers:
            self._store.call(self._name, lambda *_, buffer=buffer: self._upload.write(buffer))
            self._written += len(buffer)

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


class ObjectStore:
    """The files of a cache under a prefix of a bucket.

    Credentials, endpoint and region come from the environment of the provider: ``AWS_ACCESS_KEY_ID``,
    ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, ``AWS_REGION``, ``AWS_ENDPOINT_URL``, ``AWS_ALLOW_HTTP``, …;
    ``GOOGLE_APPLICATION_CREDENTIALS``; ``AZURE_STORAGE_*``. ``GENRECAL_STORE_TIMEOUT_S`` sets how long one answer
    may take.
    """

    def __init__(self, uri: str) -> None:
        """Take a URI; nothing is asked before the first call.

        Raises:
            ConfigError: it names no bucket, or holds a user, a password or a query.
        """
        rest = uri.partition("://")[2]
        if not rest.strip("/") or re.search(r"[@?#\0\\]|(^|/)\.\.?(/|$)", rest):
            raise ConfigError(
                f"cache uri of scheme {uri_scheme(uri)!r}: expected s3://bucket/prefix without user, query or '..'; "
                "credentials come from the environment"
            )
        self.uri = uri.rstrip("/")
        self._clients: dict[int, Any] = {}
        self._service: ObjectService | None = None

    def read(self, name: str, *, limit_bytes: int = DOCUMENT_LIMIT_BYTES) -> bytes:
        """Return a whole object, in one request."""
        if (service := self._forked_service()) is not None:
            return bytes(service.ask("read", name, limit_bytes=limit_bytes))

        def get(client: Any, path: str) -> bytes:
            answer = obstore.get(client, path)
            if answer.meta["size"] > limit_bytes:
                raise OSError(
                    errno.EFBIG, f"has {answer.meta['size']} bytes, at most {limit_bytes} are expected", self.path(name)
                )
            return bytes(answer.bytes())

        return self.call(name, get)

    def size(self, name: str) -> int | None:
        """Return the length of an object."""
        if (service := self._forked_service()) is not None:
            size: int | None = service.ask("size", name)
            return size
        try:
            return int(self.call(name, lambda client, path: obstore.head(client, path))["size"])
        except FileNotFoundError:
            return None

    def create(self, name: str, data: bytes) -> bool:
        """Give a free name these bytes, by a conditional put; a refused one is settled by reading the name."""
        for attempt in range(_CREATE_ATTEMPTS):
            try:
                self.call(name, lambda client, path: obstore.put(client, path, data, mode="create"))
            except FileExistsError:
                size = self.size(name)
                if size is not None:
                    return size == len(data) and self.read(name, limit_bytes=size) == data
                # two conditional puts at once: both may be refused
            except (PermissionError, FileNotFoundError):
                raise
            except OSError:
                if attempt == _CREATE_ATTEMPTS - 1:
                    raise
            else:
                return True
            time.sleep(_PAUSE_S * 2**attempt)
        raise OSError(errno.EAGAIN, f"could not be created in {_CREATE_ATTEMPTS} tries", self.path(name))

    def replace(self, name: str, data: bytes) -> None:
        """Give a name these bytes, whatever it held."""
        self.call(name, lambda client, path: obstore.put(client, path, data))

    def writer(self, name: str) -> ObjectWriter:
        """Start a new object."""
        check_name(name)
        return ObjectWriter(self, name)

    def sync(self, folder: str) -> None:
        """Do nothing: what the store has answered for is durable."""

    def open(self, name: str) -> ObjectReader:
        """Return a reader of an object, which need not exist yet."""
        return ObjectReader(self, check_name(name))

    def list(self, folder: str) -> Iterator[FileEntry]:
        """Yield every object under a prefix."""
        if (service := self._forked_service()) is not None:
            yield from (FileEntry(**entry) for entry in service.ask("list", folder))
            return
        entries = self._call_again(
            folder, lambda client, path: [entry for page in obstore.list(client, path or None) for entry in page]
        )
        for entry in sorted(entries, key=lambda entry: str(entry["path"])):
            yield FileEntry(name=str(entry["path"]), size_bytes=int(entry["size"]))

    def folders(self, folder: str) -> tuple[str, ...]:
        """Return the names of the prefixes one level below a prefix."""
        if (service := self._forked_service()) is not None:
            return tuple(service.ask("folders", folder))
        found = self._call_again(folder, lambda client, path: obstore.list_with_delimiter(client, path))
        return tuple(sorted(str(prefix).rstrip("/").rsplit("/", 1)[-1] for prefix in found["common_prefixes"]))

    def remove(self, name: str) -> None:
        """Delete an object and all objects under it as a prefix."""
        names = [entry.name for entry in self.list(name)]
        self.call(name, lambda client, path: obstore.delete(client, names or [path]), missing_is_fine=True)

    def path(self, name: str) -> str:
        """Return a name as errors give it."""
        return f"{self.uri}/{name}"

    def get_range(self, name: str, *, offset: int, length: int) -> Any:
        """Return some bytes of an object, in one request; fewer where it ends before."""
        if (service := self._forked_service()) is not None:
            return service.ask("get_range", name, offset=offset, length=length)
        return self.call(name, lambda client, path: obstore.get_range(client, path, start=offset, length=length))

    def call(self, name: str, request: Callable[[Any, str], T], *, missing_is_fine: bool = False) -> T:
        """Make a request about a name; return its answer, or raise what the operating system would."""
        path = check_name(name) if name else ""
        try:
            return request(self._client(), path)
        except (NotFoundError, FileNotFoundError):
            if missing_is_fine:
                return None  # type: ignore[return-value]
            raise FileNotFoundError(errno.ENOENT, "no such object", self.path(name)) from None
        except AlreadyExistsError:
            raise FileExistsError(errno.EEXIST, "exists", self.path(name)) from None
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise PermissionError(errno.EACCES, plain_message(error), self.path(name)) from None
        except NotSupportedError as error:
            raise ConfigError(f"{self.uri}: this store lacks what caches need: {plain_message(error)}") from None
        except BaseError as error:
            raise OSError(errno.EIO, plain_message(error), self.path(name)) from None

    def __reduce__(self) -> tuple[object, ...]:
        return ObjectStore, (self.uri,)

    def _call_again(self, name: str, request: Callable[[Any, str], T]) -> T:
        """Make a listing, again where its answer breaks off: the client repeats all other requests itself."""
        deadline = time.monotonic() + TIMEOUT_S
        for attempt in range(_LIST_ATTEMPTS - 1):
            try:
                return self.call(name, request)
            except (PermissionError, FileNotFoundError):
                raise
            except OSError:
                if time.monotonic() > deadline:
                    raise  # the client has tried for long enough
                time.sleep(_PAUSE_S * 2**attempt)
        return self.call(name, request)

    def _forked_service(self) -> ObjectService | None:
        if not is_forked():
            return None
        service = self._service
        if service is None or not service.is_ours:
            service = self._service = ObjectService(self.uri)
        return service

    def _client(self) -> Any:
        process = os.getpid()
        client = self._clients.get(process)
        if client is None:
            if is_forked():
                raise CacheError(
                    f"{self.uri}: process {process} was forked after an object store was used, and can only read it; "
                    "start processes that write by 'spawn' or 'forkserver'"
                )
            # without a lock: a thread that holds one during a fork would leave it held in the child
            client = self._clients.setdefault(process, connect(self.uri))
        return client
