"""Errors of the file system as programs meet them: a call on a descriptor does not say which file it was."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.reliability.shim import Kind, Point, Step

NEEDS_SPACE: tuple[Kind, ...] = ("create", "write", "sync file", "mkdir", "link", "replace")
"""Steps that a full disk refuses for as long as it is full."""
_NAMELESS: tuple[Kind, ...] = ("write", "sync file", "sync folder", "read")


def failure(step: Step, *, error: int) -> OSError:
    """Return what the call of a step raises."""
    if step.kind in _NAMELESS:
        return OSError(error, os.strerror(error))
    return OSError(error, os.strerror(error), str(step.path))


@dataclass(kw_only=True)
class Refusal:
    """Fails a step, once or from there on; to be given to :func:`tests.reliability.shim.intercept`."""

    point: Point
    error: int
    sticky: bool
    kinds: Sequence[Kind]
    """What is refused after the first time."""
    refused: list[Step] = field(default_factory=list)

    def __call__(self, step: Step) -> None:
        again = self.sticky and step.number > self.point.number and step.kind in self.kinds
        if self.point.is_at(step) or again:
            self.refused.append(step)
            raise failure(step, error=self.error)

    def is_named_by(self, message: str) -> bool:
        """Tell whether a message names a file that was refused."""
        return any(str(path) in message for step in self.refused for path in (step.path, step.target) if path)


def open_for_writing(root: Path) -> list[Path]:
    """Return the files and folders under a folder that this process holds open to write or sync them."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            path = entry.readlink()
            flags = int(Path("/proc/self/fdinfo", entry.name).read_text().split("flags:")[1].split()[0], 8)
            if path.is_relative_to(root) and flags & (os.O_WRONLY | os.O_DIRECTORY):
                found.append(path)
    return found
