"""Ends a process that stands still, so that a cluster can start it again."""

import logging
import os
import sys
import threading
import time
import traceback
from datetime import timedelta
from types import TracebackType
from typing import NoReturn

from distill.config import TrainConfig
from teacher_cache.errors import CacheIncomplete

logger = logging.getLogger(__name__)

EXIT_CODE = CacheIncomplete.exit_code
"""Like everything where a retry makes sense."""
LAST_WORDS_S = 10.0
"""Time to write the log, which may be what hangs."""
COLLECTIVE_MARGIN_S = 60.0
"""By which a collective may exceed every limit: the exit of a watchdog is to come first."""


class Watchdog:
    """Ends the process unless the next thing is expected in time. To be used as a context manager.

    A thread of this process looks at the clock; it works while the main thread waits for data or in a collective.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._what = ""
        self._limit_s = 0.0
        self._deadline: float | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def expect(self, what: str, *, within_s: float) -> None:
        """End the wait for what was expected before, and start to wait for this."""
        with self._changed:
            self._what, self._limit_s, self._deadline = what, within_s, time.monotonic() + within_s
            self._changed.notify()

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _watch(self) -> None:
        with self._changed:
            while not self._stopped:
                left = None if self._deadline is None else self._deadline - time.monotonic()
                if left is not None and left <= 0:
                    self._end()
                self._changed.wait(left)

    def _end(self) -> NoReturn:
        threading.Timer(LAST_WORDS_S, os._exit, (EXIT_CODE,)).start()
        logger.critical(
            "%s did not end within %g s: this process gives up and exits with %d; start again to go on from the last "
            "checkpoint. Its threads are at:\n%s",
            self._what,
            self._limit_s,
            EXIT_CODE,
            stacks(),
        )
        logging.shutdown()
        os._exit(EXIT_CODE)


def collective_timeout(train: TrainConfig) -> timedelta:
    """Return how long processes may wait for one that works alone: as long as its watchdog lets it."""
    return timedelta(seconds=max(train.hang_timeout_s, train.slow_timeout_s) + COLLECTIVE_MARGIN_S)


def stacks() -> str:
    """Return where every Python thread of this process is."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
