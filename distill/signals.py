"""Termination signals are noted, and acted upon at the next step boundary."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

HANDLED = (signal.SIGTERM, signal.SIGINT)


@dataclass
class Signals:
    """What this process received so far."""

    received: int = 0
    """Number of the first signal, or 0."""

    @property
    def number(self) -> int:
        """The signal to report; when another process received it, the one that launchers send."""
        return self.received or signal.SIGTERM


@contextmanager
def noted_signals() -> Iterator[Signals]:
    """Note SIGTERM and SIGINT instead of dying; a second one of them ends the process as usual."""
    signals = Signals()
    previous = {number: signal.getsignal(number) for number in HANDLED}

    def note(number: int, _: FrameType | None) -> None:
        signals.received = number
        for handled, handler in previous.items():
            signal.signal(handled, handler)

    for number in HANDLED:
        signal.signal(number, note)
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
