"""Progress of long jobs: a bar on a terminal, otherwise one plain log line per interval."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import tqdm

logger = logging.getLogger(__name__)

INTERVAL_S = 30.0


class Progress(Protocol):
    """A running job that counts units of work."""

    def update(self, n: int = 1, **postfix: Any) -> None:
        """Count ``n`` more units; ``postfix`` is shown beside the count."""
        ...


@dataclass(frozen=True, kw_only=True)
class PieceProgress:
    """A sign of life from an actor: what it has done of its piece of work so far."""

    samples: int
    """Done or skipped."""
    tokens: int


@contextmanager
def progress(*, total: int, unit: str, description: str, initial: int = 0) -> Iterator[Progress]:
    """Show the progress of the block; ``initial`` units were done before."""
    if sys.stderr.isatty():
        with tqdm.tqdm(total=total, unit=unit, desc=description, initial=initial, dynamic_ncols=True) as bar:
            yield _Bar(bar)
    else:
        lines = _Lines(total=total, unit=unit, description=description, initial=initial)
        yield lines
        if total:
            lines.show()


class _Bar:
    def __init__(self, bar: "tqdm.tqdm[Any]") -> None:
        self.bar = bar

    def update(self, n: int = 1, **postfix: Any) -> None:
        self.bar.set_postfix(postfix, refresh=False)
        self.bar.update(n)


class _Lines:
    def __init__(self, *, total: int, unit: str, description: str, initial: int) -> None:
        self.total, self.unit, self.description = total, unit, description
        self.initial = self.done = initial
        self.postfix: dict[str, Any] = {}
        self.started = self.shown = time.monotonic()

    def update(self, n: int = 1, **postfix: Any) -> None:
        self.done += n
        self.postfix = postfix
        if time.monotonic() - self.shown >= INTERVAL_S:
            self.show()

    def show(self) -> None:
        self.shown = time.monotonic()
        elapsed = self.shown - self.started
        parts = [f"{self.done}/{self.total} {self.unit}s", f"{clock_text(elapsed)} elapsed"]
        if self.done > self.initial and elapsed > 0:
            parts.append(f"{(self.done - self.initial) / elapsed:.3g} {self.unit}s/s")
        if self.initial < self.done < self.total:
            parts.append(f"{clock_text(elapsed * (self.total - self.done) / (self.done - self.initial))} left")
        parts += [f"{name} {value}" for name, value in self.postfix.items()]
        logger.info("%s: %s", self.description, ", ".join(parts))


def clock_text(seconds: float) -> str:
    """Return a duration as people read it: 0:07, 12:30, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
