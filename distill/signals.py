"""Termination signals are noted, and acted upon between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

HANDLED = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """A signal came while nothing but waiting was going on."""


@dataclass
class Signals:
    """What this process received so far."""

    received: int = 0
    """Number of the first signal, or 0."""
    waiting: bool = False
    """Whether a signal raises Interrupted rather than being noted only."""

    @property
    def number(self) -> int:
        """The signal to report; when another process received it, the one that launchers send."""
        return self.received or signal.SIGTERM

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let a signal end the block by Interrupted, also one that came before it."""
        self.waiting = True
        try:
            if self.received:
                raise Interrupted
            yield
        finally:
            self.waiting = False


@contextmanager
def noted_signals() -> Iterator[Signals]:
    """Note SIGTERM and SIGINT instead of dying; a second one of them ends the process at once, whatever it does.

    In another thread than the main one, as in a Ray Train worker, signals are left to whoever owns the process.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    previous = {number: signal.getsignal(number) for number in HANDLED}

    def note(number: int, _: FrameType | None) -> None:
        signals.received = number
        for handled in HANDLED:
            # not the previous handlers: Python would not run them while a collective waits
            signal.signal(handled, signal.SIG_DFL)
        if signals.waiting:
            raise Interrupted

    for number in HANDLED:
        signal.signal(number, note)
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
