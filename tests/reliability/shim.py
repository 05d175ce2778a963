"""The operating system as local stores see it: each step is counted, and can be made to go wrong."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from teacher_cache import local_files, local_store

Kind = Literal[
    "create",
    "write",
    "sync file",
    "sync folder",
    "mkdir",
    "chmod",
    "link",
    "replace",
    "unlink",
    "rmdir",
    "read",
    "list",
]
CHANGES: tuple[Kind, ...] = (
    "create",
    "write",
    "sync file",
    "sync folder",
    "mkdir",
    "chmod",
    "link",
    "replace",
    "unlink",
    "rmdir",
)
READS: tuple[Kind, ...] = ("read", "list")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One call of the file system."""

    number: int
    """From 1."""
    kind: Kind
    path: Path
    target: Path | None = None
    """The new name of a link or a rename."""
    buffers: Sequence[memoryview] = ()
    """What is written, or read into."""
    descriptor: int = -1

    @property
    def is_within_shard(self) -> bool:
        """Whether a shard is being written: the longest part of a build, of which nothing is named yet."""
        return "shards" in self.path.parts

    def do_half(self) -> None:
        """Write the first half of what is to be written."""
        data = b"".join(self.buffers)
        if self.kind == "write" and len(data) > 1:
            os.write(self.descriptor, data[: len(data) // 2])


React = Callable[[Step], None]


class Killed(BaseException):
    """Stands for a process that is gone: no handler of an error catches it."""


class OsShim:
    """Acts as the module ``os`` and calls ``react`` before each step of the chosen kinds."""

    def __init__(self, react: React, *, kinds: Sequence[Kind], durable: bool) -> None:
        self.steps = 0
        self._react = react
        self._kinds = kinds
        self._durable = durable
        self._paths: dict[int, Path] = {}
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            self._step("create", path)
        descriptor = os.open(path, flags, mode)
        self._paths[descriptor] = Path(path)
        return descriptor

    def close(self, descriptor: int) -> None:
        self._paths.pop(descriptor, None)
        os.close(descriptor)

    def write(self, descriptor: int, buffer: memoryview) -> int:
        self._step("write", self._paths[descriptor], buffers=[buffer], descriptor=descriptor)
        return os.write(descriptor, buffer)

    def writev(self, descriptor: int, buffers: Sequence[memoryview]) -> int:
        self._step("write", self._paths[descriptor], buffers=buffers, descriptor=descriptor)
        return os.writev(descriptor, buffers)

    def preadv(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._step("read", self._paths[descriptor], buffers=buffers, descriptor=descriptor)
        return os.preadv(descriptor, buffers, offset)

    def fsync(self, descriptor: int) -> None:
        path = self._paths[descriptor]
        self._step("sync folder" if path.is_dir() else "sync file", path, descriptor=descriptor)
        if self._durable:
            os.fsync(descriptor)

    def posix_fadvise(self, *_: int) -> None:
        """Ignore the advice, as a kernel may: what is written stays in memory until it is synced."""

    def mkdir(self, path: Any, mode: int = 0o777) -> None:
        self._step("mkdir", path)
        os.mkdir(path, mode)

    def chmod(self, path: Any, mode: int) -> None:
        self._step("chmod", path)
        os.chmod(path, mode)

    def link(self, source: Any, target: Any) -> None:
        self._step("link", source, target=target)
        os.link(source, target)

    def replace(self, source: Any, target: Any) -> None:
        self._step("replace", source, target=target)
        os.replace(source, target)

    def unlink(self, path: Any) -> None:
        self._step("unlink", path)
        os.unlink(path)

    def rmdir(self, path: Any) -> None:
        self._step("rmdir", path)
        os.rmdir(path)

    def scandir(self, path: Any) -> Any:
        self._step("list", path)
        return os.scandir(path)

    def walk(self, top: Any, **options: Any) -> Any:
        self._step("list", top)
        return os.walk(top, **options)

    def _step(self, kind: Kind, path: Any, **details: Any) -> None:
        if kind not in self._kinds:
            return
        with self._lock:
            self.steps += 1
            number = self.steps
        target = details.pop("target", None)
        self._react(
            Step(number=number, kind=kind, path=Path(path), target=None if target is None else Path(target), **details)
        )


class ShutilShim:
    """Acts as the module ``shutil``: removes a tree by steps of the shim."""

    def __init__(self, shim: OsShim) -> None:
        self._shim = shim

    def rmtree(self, top: Path) -> None:
        for parent, folders, files in os.walk(top, topdown=False):
            for name in files:
                self._shim.unlink(Path(parent, name))
            for name in folders:
                self._shim.rmdir(Path(parent, name))
        self._shim.rmdir(top)


class InlineExecutor:
    """Acts as a pool of threads that does its work at once."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def submit(self, work: Callable[..., Any], *arguments: object, **options: object) -> "Future[Any]":
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments, **options))
        except BaseException as error:
            future.set_exception(error)
        return future

    def map(self, work: Callable[..., Any], *items: Iterable[Any]) -> Iterator[Any]:
        return map(work, *items)

    def shutdown(self, *, cancel_futures: bool) -> None: ...

    def __enter__(self) -> "InlineExecutor":
        return self

    def __exit__(self, *_: object) -> None: ...


@contextmanager
def one_thread() -> Iterator[None]:
    """Let stores work in the caller's thread, so that the order of the steps is always the same."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("teacher_cache.") and hasattr(module, "ThreadPoolExecutor"):
                patch.setattr(module, "ThreadPoolExecutor", InlineExecutor)
        yield


@contextmanager
def intercept(react: React, *, kinds: Sequence[Kind] = CHANGES, durable: bool = False) -> Iterator[OsShim]:
    """Let ``react`` see each step of a local store; it may raise, kill the process, or do nothing.

    A kill does not touch what the kernel holds, so unless ``durable`` nothing is really synced, which saves time.
    """
    shim = OsShim(react, kinds=kinds, durable=durable)
    with pytest.MonkeyPatch.context() as patch:
        for module in (local_files, local_store):
            patch.setattr(module, "os", shim)
        patch.setattr(local_store, "shutil", ShutilShim(shim))
        yield shim


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where something goes wrong."""

    number: int
    torn: bool = False
    """In the middle of a write rather than before the step."""

    def is_at(self, step: Step) -> bool:
        """Tell whether this is the step; half of a torn write is done then."""
        if step.number != self.number:
            return False
        if self.torn:
            step.do_half()
        return True


def points_of(steps: Sequence[Step]) -> list[Point]:
    """Return every point of a run: before each step, and in the middle of each write."""
    before = [Point(number=step.number) for step in steps]
    return before + [Point(number=step.number, torn=True) for step in steps if step.kind == "write"]


def kill_at(point: Point) -> React:
    """Return a reaction that ends the process at a point, as kill -9 does."""

    def react(step: Step) -> None:
        if point.is_at(step):
            os.kill(os.getpid(), signal.SIGKILL)

    return react


def stop_at(point: Point) -> React:
    """Return a reaction that ends the work at a point within this process: not even its clean-up does a step."""
    stopped = False

    def react(step: Step) -> None:
        nonlocal stopped
        stopped = stopped or point.is_at(step)
        if stopped:
            raise Killed(point)

    return react


def fail_at(point: Point, *, error: int, sticky: bool) -> React:
    """Return a reaction that fails at a point, once or from there on."""

    def react(step: Step) -> None:
        if point.is_at(step) or (sticky and step.number > point.number):
            raise OSError(error, os.strerror(error), str(step.path))

    return react
