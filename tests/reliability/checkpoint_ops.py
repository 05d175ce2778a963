"""The file operations of a checkpoint's save: counted, and one of them the last that this process does."""

import builtins
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

CALLS = ("open", "mkdir", "replace", "rename", "unlink", "rmdir", "fsync")
PIECES = 8
"""In which a large file is written."""


class Operations:
    """Counts operations; at number ``kill_at`` the process is gone, as after kill -9."""

    def __init__(self, *, kill_at: int | None = None) -> None:
        self.count = 0
        self._kill_at = kill_at

    def step(self) -> None:
        """Note that an operation is about to be done."""
        self.count += 1
        if self.count == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a call that is counted."""

        def counted(*arguments: Any, **options: Any) -> Any:
            self.step()
            return call(*arguments, **options)

        return counted

    def open(self, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        """Open a file whose writes are counted, each as torn by the kill before its end."""
        opened = _OPEN(file, mode, *arguments, **options)
        if "w" in mode or "a" in mode:
            self.step()
            return _Written(opened, self)
        return opened

    def save(self, state: Any, path: Any) -> None:
        """Write what torch would write, in pieces."""
        buffer = io.BytesIO()
        _SAVE(state, buffer)
        data = buffer.getvalue()
        size = -(-len(data) // PIECES)
        with self.open(path, "wb") as file:
            for start in range(0, len(data), size):
                file.write(data[start : start + size])


class _Written:
    def __init__(self, file: Any, operations: Operations) -> None:
        self._file, self._operations = file, operations

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_Written":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        self._operations.step()
        written = self._file.write(data)
        self._file.flush()
        return written


@contextmanager
def counted(operations: Operations) -> Iterator[None]:
    """Let every change to a file within the block be counted."""
    with (
        mock.patch.multiple(os, **{name: operations.before(getattr(os, name)) for name in CALLS}),
        mock.patch.object(io, "open", operations.open),
        mock.patch.object(builtins, "open", operations.open),
        mock.patch.object(torch, "save", operations.save),
    ):
        yield


_OPEN = io.open
_SAVE = torch.save
