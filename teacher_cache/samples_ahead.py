"""Reads the samples of the shard that comes next in a thread, so that no replica and no sign waits for the data."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Final, TypeVar

from teacher_cache.errors import DataError
from teacher_cache.plan import PlannedShard
from teacher_cache.schema import Sample

logger = logging.getLogger(__name__)

T = TypeVar("T")

READ_ATTEMPTS: Final = 3
READ_PAUSE_S: Final = 3.0


class SamplesAhead:
    """The samples of shards, at most one shard ahead. To be used as a context manager, whose end is the thread's."""

    def __init__(
        self, read: Callable[[PlannedShard], list[Sample]], *, upcoming: Callable[[], PlannedShard | None]
    ) -> None:
        """Read nothing yet.

        Args:
            read: Reads the samples of a shard; called by the thread alone, since a data file has one position.
            upcoming: Tells which shard is likely wanted next; a wrong guess costs its reading.
        """
        self._read = read
        self._upcoming = upcoming
        self._closed = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="samples-ahead")
        self._ahead: tuple[str, Future[list[Sample]]] | None = None

    def take(self, shard: PlannedShard) -> list[Sample]:
        """Return the samples of a shard that is no longer upcoming, and have those of the next read.

        Raises:
            DataError: They could not be read ``READ_ATTEMPTS`` times.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == shard.shard_id:
            reading = ahead[1]
        else:
            if ahead is not None:
                ahead[1].cancel()
            reading = self._submit(shard)
        if (following := self._upcoming()) is not None:
            self._ahead = following.shard_id, self._submit(following)
        return reading.result()

    def __enter__(self) -> "SamplesAhead":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.shutdown(cancel_futures=True)

    def _submit(self, shard: PlannedShard) -> "Future[list[Sample]]":
        return self._thread.submit(
            read_patiently, lambda: self._read(shard), what=f"shard {shard.shard_id}", stop=self._closed
        )


def read_patiently(read: Callable[[], T], *, what: str, stop: threading.Event | None = None) -> T:
    """Return what ``read`` does, called again where it fails: a disk's passing error looks as changed data does.

    Args:
        read: Reads samples.
        what: What they belong to.
        stop: Once set, nothing is tried again.

    Raises:
        DataError: It failed ``READ_ATTEMPTS`` times.
    """
    stop = stop or threading.Event()
    for attempt in range(1, READ_ATTEMPTS):
        try:
            return read()
        except DataError as error:
            logger.warning("%s: attempt %d of %d to read its samples failed: %s", what, attempt, READ_ATTEMPTS, error)
            if stop.wait(READ_PAUSE_S):
                raise
    return read()
