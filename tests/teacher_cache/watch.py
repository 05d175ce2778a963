"""Sees what a process does outside a folder, and whether it runs code that it was given."""

import ctypes
import os
import struct
import sys
from pathlib import Path
from typing import Any

_CODE = ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect")
_FILES = ("open", "os.", "shutil.")
_OWN = tuple(
    os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, Path(__file__).parents[2], "/proc", "/sys")
)
"""What a process may open at any time: modules, and what the system says of the process."""
_NOT_FOLLOWED = ("os.remove", "os.rename", "os.link", "os.mkdir", "os.rmdir")
_INOTIFY_EVENTS = 0xFFF
_LIBC = ctypes.CDLL(None, use_errno=True)
_watching: list["Watch"] = []


class Watch:
    """Watches while it is entered; ``strange`` lists what must not be.

    An audit hook sees every call of Python. What libraries do by themselves shows in inotify's events on ``outside``.
    """

    def __init__(self, root: Path, *, outside: Path) -> None:
        self.strange: list[str] = []
        self._root = os.path.realpath(root)
        self._outside = outside
        self._inotify = -1
        self._before: dict[str, tuple[int, bytes]] = {}

    def __enter__(self) -> "Watch":
        self._before = _content(self._outside)
        self._inotify = _LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        for folder in [self._outside, *(path for path in self._outside.rglob("*") if path.is_dir())]:
            assert _LIBC.inotify_add_watch(self._inotify, os.fsencode(folder), _INOTIFY_EVENTS) >= 0
        if _dispatch not in _hooked:
            _hooked.append(_dispatch)
            sys.addaudithook(_dispatch)
        _watching.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _watching.remove(self)
        self.strange = list(dict.fromkeys([*self.strange, *self._events()]))
        os.close(self._inotify)
        if _content(self._outside) != self._before:
            self.strange.append("files outside were changed")

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Take an audit event."""
        if event in _CODE:
            self.strange.append(event)
        elif event.startswith(_FILES):
            paths = [os.fsdecode(x) for x in arguments[:2] if isinstance(x, str | bytes | os.PathLike) and x]
            for path in paths if event != "open" else paths[:1]:
                if not self._is_inside(path, follow=event not in _NOT_FOLLOWED):
                    self.strange.append(f"{event} {path!r}")

    def _is_inside(self, path: str, *, follow: bool) -> bool:
        if "\0" in path:
            return False
        folder, name = os.path.split(path)
        real = os.path.realpath(path) if follow else os.path.join(os.path.realpath(folder), name)
        return (real + os.sep).startswith((self._root + os.sep, *(own + os.sep for own in _OWN)))

    def _events(self) -> list[str]:
        found = []
        try:
            data = os.read(self._inotify, 2**16)
        except BlockingIOError:
            return found
        while data:
            _, mask, _, length = struct.unpack_from("iIII", data)
            name = data[16 : 16 + length].rstrip(b"\0").decode(errors="replace")
            found.append(f"inotify {mask:#x} of {name!r} outside")
            data = data[16 + length :]
        return found


_hooked: list[object] = []


def _dispatch(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching:
        watch = _watching[-1]
        _watching.remove(watch)  # what the watch itself looks at
        try:
            watch.see(event, arguments)
        finally:
            _watching.append(watch)


def _content(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*")
    }
