"""Reads that go wrong: refused, cut short, or at the end of a file that has lost its tail."""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from teacher_cache import local_files, local_store
from tests.reliability.faults import failure
from tests.reliability.shim import READS, OsShim, Step

Trouble = Literal["refused", "short", "end of file"]
TROUBLES: tuple[Trouble, ...] = ("refused", "short", "end of file")


@dataclass(kw_only=True)
class ReadFault:
    """Troubles one step that reads; number 0 troubles none and only counts."""

    number: int = 0
    trouble: Trouble = "refused"
    steps: list[Step] = field(default_factory=list)
    struck: Step | None = None

    def __call__(self, step: Step) -> None:
        self.steps.append(step)
        if step.number == self.number:
            self.struck = step
            if self.trouble == "refused" or step.kind != "read":
                raise failure(step, error=errno.EIO)

    def cut(self, wanted: int) -> int:
        """Return how many of the wanted bytes the read gives that was announced last."""
        if self.struck is None or self.struck.path != self.steps[-1].path:
            return wanted
        if self.trouble == "end of file":
            return 0
        return wanted // 2 if self.struck is self.steps[-1] else wanted


class _ReadShim(OsShim):
    def __init__(self, fault: ReadFault) -> None:
        super().__init__(fault, kinds=READS, durable=False)
        self._fault = fault

    def preadv(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._step("read", self._paths[descriptor], buffers=buffers, descriptor=descriptor)
        wanted = sum(len(buffer) for buffer in buffers)
        data = os.pread(descriptor, self._fault.cut(wanted), offset)
        rest = memoryview(data)
        for buffer in buffers:
            part, rest = rest[: len(buffer)], rest[len(buffer) :]
            buffer[: len(part)] = part
        return len(data)


@contextmanager
def troubled_reads(fault: ReadFault) -> Iterator[Any]:
    """Let a fault act on the reads of local stores."""
    shim = _ReadShim(fault)
    with pytest.MonkeyPatch.context() as patch:
        for module in (local_files, local_store):
            patch.setattr(module, "os", shim)
        yield
