"""A cache in an object store: S3 and what speaks like it, Google Cloud Storage, Azure. Knows obstore, alone.

Every object is written once, so durability needs no more than the store's own answer; a commit is a conditional put.
"""

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
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
from teacher_cache.object_files import PARALLEL_PARTS, PART_BYTES, ObjectReader, ObjectWriter
from teacher_cache.object_service import ObjectService
from teacher_cache.storage import COPY_BYTES, DOCUMENT_LIMIT_BYTES, FileEntry, check_name, uri_scheme

T = TypeVar("T")

_CREATE_ATTEMPTS = 5
_LIST_ATTEMPTS = 5
_PAUSE_S = 0.2


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
        """Return a whole object, in one request; a long one in pieces, since a request ends at the timeout."""
        if (service := self._forked_service()) is not None:
            return bytes(service.ask("read", name, limit_bytes=limit_bytes))

        def get(client: Any, path: str) -> bytes | int:
            answer = obstore.get(client, path)
            size = int(answer.meta["size"])
            if size > limit_bytes:
                raise OSError(errno.EFBIG, f"has {size} bytes, at most {limit_bytes} are expected", self.path(name))
            return bytes(answer.bytes()) if size <= COPY_BYTES else size  # a longer body is not waited for

        if isinstance(found := self.call(name, get), bytes):
            return found
        data, reader = bytearray(found), self.open(name)
        for offset in range(0, found, COPY_BYTES):
            reader.read_into(offset, [memoryview(data)[offset : offset + COPY_BYTES]])
        return bytes(data)

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
        """Give a free name these bytes, by a conditional put: one request, of at most 5 GiB on S3."""
        return self._create(
            name, data, lambda: self.call(name, lambda client, path: obstore.put(client, path, data, mode="create"))
        )

    def create_content(self, name: str, data: bytes) -> bool:
        """Give a free name these bytes; many go up in parts, which no put with a condition does."""
        if len(data) <= PART_BYTES:
            return self.create(name, data)

        def put() -> None:
            if self.size(name) is not None:
                raise FileExistsError(errno.EEXIST, "exists", self.path(name))
            try:
                self.call(
                    name,
                    lambda client, path: obstore.put(
                        client, path, data, chunk_size=PART_BYTES, max_concurrency=PARALLEL_PARTS
                    ),
                )
            except FileNotFoundError:
                # what S3 says of an upload that is finished already, after its answer was lost
                raise OSError(errno.EIO, "there is no such upload any more", self.path(name)) from None

        return self._create(name, data, put)

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

    def _create(self, name: str, data: bytes, put: Callable[[], object]) -> bool:
        """Put until the name is taken; whether it holds these bytes, only reading it tells."""
        for attempt in range(_CREATE_ATTEMPTS):
            try:
                put()
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
