"""A cache in a local folder: durable steps made of plain system calls."""

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from teacher_cache.config import Sharing
from teacher_cache.errors import CacheError
from teacher_cache.local_files import LocalReader, LocalWriter, name_error
from teacher_cache.storage import DOCUMENT_LIMIT_BYTES, FileEntry, check_name

STAGING = "staging"
"""Holds temporary files while :meth:`LocalStore.create` gives them their names."""

_FOLDER_MODES: dict[Sharing, int] = {"private": 0o700, "group": 0o750}
_CREATE_ATTEMPTS = 5


class LocalStore:
    """The files of a cache in one folder."""

    def __init__(self, root: Path) -> None:
        """Take a folder, which need not exist.

        Raises:
            CacheError: anybody may write to the folder.
        """
        self.root = root
        self.uri = str(root)
        try:
            mode = root.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            mode = _FOLDER_MODES["private"]
        except OSError as error:
            raise CacheError(f"cannot look at {root}: {error}") from error
        if mode & stat.S_IWOTH:
            raise CacheError(
                f"{root} may be written by every user, so nothing in it can be trusted; run chmod o-w on it"
            )
        self._folder_mode = 0o700 | (mode & 0o070)
        self._file_mode = self._folder_mode & 0o660
        self._synced: set[Path] = set()

    @classmethod
    def create_folder(cls, root: Path, *, sharing: Sharing) -> "LocalStore":
        """Make the folder durably, with the folders above it, unless it is there."""
        made = []
        for folder in [root, *root.parents]:
            if folder.is_dir():
                with suppress(OSError):  # whoever made it may have died before this; a foreign folder may refuse
                    _sync_folder(folder.parent)
                break
            made.append(folder)
        for folder in reversed(made):
            with suppress(FileExistsError):
                os.mkdir(folder, _FOLDER_MODES[sharing] if folder == root else 0o777)
            if folder == root:
                os.chmod(folder, _FOLDER_MODES[sharing])
            _sync_folder(folder.parent)
        return cls(root)

    def read(self, name: str, *, limit_bytes: int = DOCUMENT_LIMIT_BYTES) -> bytes:
        """Return a whole file."""
        reader = self.open(name)
        if reader.size_bytes > limit_bytes:
            raise OSError(errno.EFBIG, f"has {reader.size_bytes} bytes, at most {limit_bytes} are expected", name)
        data = bytearray(reader.size_bytes)
        reader.read_into(0, [memoryview(data)])
        return bytes(data)

    def size(self, name: str) -> int | None:
        """Return the length of a regular file."""
        try:
            status = os.lstat(self._path(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is no regular file", str(self.root / name))
        return status.st_size

    def create(self, name: str, data: bytes) -> bool:
        """Give a free name these bytes, by a hard link, which fails when the name is taken."""
        target = self._path(name)
        for _ in range(_CREATE_ATTEMPTS):
            staged = self._stage(target.name, data)
            try:
                self._make_folders(target.parent)
                os.link(staged, target)
                won: bool | None = True
            except FileExistsError:
                won = self._holds(name, data)
            except FileNotFoundError:
                won = None  # whoever tidied the folder took our temporary file
            finally:
                self._unlink(staged)
            if won is not None:
                _sync_folder(target.parent)
                return won
        raise FileNotFoundError(errno.ENOENT, "is removed whenever it is written", str(target))

    def create_content(self, name: str, data: bytes) -> bool:
        """Give a free name these bytes, as any other."""
        return self.create(name, data)

    def replace(self, name: str, data: bytes) -> None:
        """Give a name these bytes, by a rename."""
        target = self._path(name)
        staged = self._stage(target.name, data)
        try:
            self._make_folders(target.parent)
            os.replace(staged, target)
        except OSError:
            self._unlink(staged)
            raise

    def writer(self, name: str) -> LocalWriter:
        """Start a new file."""
        path = self._path(name)
        self._make_folders(path.parent)
        return LocalWriter(path, mode=self._file_mode)

    def sync(self, folder: str) -> None:
        """Make every name under a folder, and the folder's own, durable."""
        path = self.path(folder)
        for parent, _, _ in os.walk(path, topdown=False, onerror=_raise_unless_absent):
            _sync_folder(Path(parent))
        _sync_folder(path.parent)

    def open(self, name: str) -> LocalReader:
        """Open a file for random access."""
        return LocalReader(self.path(name))

    def list(self, folder: str) -> Iterator[FileEntry]:
        """Yield every file, also those that are no regular files, by relative name."""
        top = self.path(folder) if folder else self.root
        found = []
        for parent, folders, files in os.walk(top, onerror=_raise_unless_absent):
            links = [name for name in folders if Path(parent, name).is_symlink()]
            found += [Path(parent, name) for name in [*files, *links]]
        for path in sorted(found):
            try:
                size = path.lstat().st_size
            except FileNotFoundError:
                continue
            yield FileEntry(name=path.relative_to(self.root).as_posix(), size_bytes=size)

    def folders(self, folder: str) -> tuple[str, ...]:
        """Return the names of the folders in a folder."""
        try:
            with os.scandir(self.path(folder)) as entries:
                return tuple(sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False)))
        except (FileNotFoundError, NotADirectoryError):
            return ()

    def remove(self, name: str) -> None:
        """Delete a file, a link or a folder; its name need not be a plain one."""
        segments = name.split("/")
        if "\0" in name or not {"", ".", ".."}.isdisjoint(segments):
            raise OSError(errno.EINVAL, "leads out of the cache", name)
        path = self._below_own_folders(segments)
        if path.is_dir() and not path.is_symlink():
            _remove_folder(path)
        else:
            self._unlink(path)

    def __reduce__(self) -> tuple[object, ...]:
        return LocalStore, (self.root,)

    def path(self, name: str) -> Path:
        """Return where a file or folder lies.

        Raises:
            OSError: it, or a folder above it, is a link or may be written by every user.
        """
        path = self._path(name)
        _require_own(path)
        return path

    def _path(self, name: str) -> Path:
        return self._below_own_folders(check_name(name).split("/"))

    def _below_own_folders(self, segments: Sequence[str]) -> Path:
        path = self.root
        for number, segment in enumerate(segments):
            if number:
                _require_own(path)
            path = path / segment
        return path

    def _make_folders(self, folder: Path) -> None:
        # another process may have made a shared folder and died before its name was durable
        is_shared = folder.parent == self.root
        if folder.is_dir() and (not is_shared or folder in self._synced):
            return
        self._make_folders(folder.parent)
        with suppress(FileExistsError):
            os.mkdir(folder, self._folder_mode)
            os.chmod(folder, self._folder_mode)
        _sync_folder(folder.parent)
        if is_shared:
            self._synced.add(folder)

    def _holds(self, name: str, data: bytes) -> bool | None:
        """Tell whether a name that is taken holds these bytes; None when it is free again."""
        try:
            reader = self.open(name)
            return reader.size_bytes == len(data) and self.read(name, limit_bytes=len(data)) == data
        except FileNotFoundError:
            return None

    def _stage(self, name: str, data: bytes) -> Path:
        staged = self._path(f"{STAGING}/{name}.{uuid.uuid4().hex}")
        self._make_folders(staged.parent)
        try:
            with LocalWriter(staged, mode=self._file_mode) as file:
                file.write([memoryview(data)])
        except OSError:
            self._unlink(staged)
            raise
        return staged

    def _unlink(self, path: Path) -> None:
        with suppress(FileNotFoundError):
            os.unlink(path)


def _require_own(path: Path) -> None:
    """Refuse what others may have put there: a link may lead out of the cache."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISLNK(mode):
        raise OSError(errno.ELOOP, "is a link, which no cache holds; put the file or folder itself there", str(path))
    if mode & stat.S_IWOTH:
        raise OSError(errno.EPERM, "may be written by every user, so it cannot be trusted; run chmod o-w", str(path))


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        name_error(error, path, doing="storing the names in it")
        raise
    finally:
        os.close(descriptor)


def _remove_folder(path: Path) -> None:
    while path.is_dir():
        try:
            shutil.rmtree(path)
        except OSError as error:
            # another process removes it too, or has not noticed yet that what it writes there is in vain
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                raise
