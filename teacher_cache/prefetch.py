"""Makes the items of an iterator ahead, in a thread."""

import queue
import threading
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Final, Generic, TypeVar

T = TypeVar("T")

_END: Final = object()
_LOOK_S = 0.1


class Prefetch(Generic[T]):
    """The items of an iterable, up to ``depth`` of them ahead of who takes them. To be used as a context manager.

    What the iterable raises is raised where its next item is taken. Leaving the block stops the thread, which then
    closes the iterable where that is a generator.
    """

    def __init__(self, items: Iterable[T], *, depth: int = 1) -> None:
        self._ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._work, args=(iter(items),), name="prefetch", daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether the next item can be taken, or the end be met, without waiting."""
        return self._ended or not self._ready.empty()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        while not self._ended:
            try:
                item, error = self._ready.get(timeout=_LOOK_S)
            except queue.Empty:
                self._ended = self._stopped.is_set()
                continue
            if item is not _END:
                return item
            self._ended = True
            if error is not None:
                raise error
        raise StopIteration

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def _work(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                self._put(item, None)
                if self._stopped.is_set():
                    return
            self._put(_END, None)
        except BaseException as error:
            self._put(_END, error)
        finally:
            if (close := getattr(items, "close", None)) is not None:
                close()

    def _put(self, item: Any, error: BaseException | None) -> None:
        while not self._stopped.is_set():
            try:
                self._ready.put((item, error), timeout=_LOOK_S)
                return
            except queue.Full:
                continue
