"""What a file system may hold after a power cut, from the steps that a process took.

Names wait for the sync of their folder, data for the sync of their file; until then any subset of them may be on the
disk, in any order, and a write may be there in part. Stricter than ext4, xfs or btrfs.
"""

import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from blake3 import blake3

from tests.reliability.shim import Killed, Point, React, Step, intercept, stop_at

Extent = Literal["whole", "half", "zeros"]

_RANDOM_SUBSETS = 2
"""Per moment."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one step changes on the disk once it gets there."""

    synced_by: int
    """Number of the folder or file whose sync makes it durable."""
    names: tuple[tuple[int, str, int | None], ...] = ()
    """Folder, name, and what the name stands for now."""
    makes_folder: bool = False
    """The name stands for a new folder."""
    file: int | None = None
    offset: int = 0
    data: bytes = b""


@dataclass
class Disk:
    """Names and contents, by number of the folder or file; 0 is the top."""

    names: dict[int, dict[str, int]] = field(default_factory=lambda: {0: {}})
    contents: dict[int, bytes] = field(default_factory=dict)

    def apply(self, effect: Effect, *, extent: Extent = "whole") -> None:
        """Let an effect reach the disk, as a whole or in part."""
        for folder, name, number in effect.names:
            entries = self.names.setdefault(folder, {})
            if number is None:
                entries.pop(name, None)
            else:
                entries[name] = number
                if effect.makes_folder:
                    self.names.setdefault(number, {})
        if effect.file is not None:
            data = effect.data
            if extent == "half":
                data = data[: len(data) // 2]
            elif extent == "zeros":
                data = bytes(len(data))
            old = self.contents.get(effect.file, b"").ljust(effect.offset, b"\0")
            self.contents[effect.file] = old[: effect.offset] + data + old[effect.offset + len(data) :]

    def number_of(self, path: Path) -> int:
        """Return the number of what a path below the top stands for."""
        number = 0
        for part in path.parts:
            number = self.names[number][part]
        return number

    def copy(self) -> "Disk":
        """Return a disk of the same state."""
        names = {folder: dict(entries) for folder, entries in self.names.items()}
        return Disk(names=names, contents=dict(self.contents))

    def files(self, folder: int = 0, above: str = "") -> Iterator[tuple[str, bytes | None]]:
        """Yield every path that can be reached, with its content; None for a folder."""
        for name, number in sorted(self.names[folder].items()):
            if number in self.names:
                yield f"{above}{name}", None
                yield from self.files(number, f"{above}{name}/")
            else:
                yield f"{above}{name}", self.contents.get(number, b"")

    def digest(self) -> str:
        """Return what tells two states apart."""
        hasher = blake3()
        for path, data in self.files():
            hasher.update(f"{path}\0{-1 if data is None else len(data)}\0".encode() + (data or b""))
        return hasher.hexdigest()

    def write_to(self, place: Path) -> None:
        """Make this state under an empty folder."""
        for path, data in self.files():
            if data is None:
                (place / path).mkdir(mode=0o700)
            else:
                (place / path).write_bytes(data)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """The time after one step: what is on the disk for sure, what may be, and what was acknowledged."""

    durable: Disk
    pending: tuple[Effect, ...]
    acknowledged: frozenset[str]
    last: Step | None

    @property
    def is_within_shard(self) -> bool:
        """Whether a shard was being written."""
        return self.last is not None and self.last.is_within_shard

    def state(self, kept: dict[int, Extent]) -> "State":
        """Return the state in which, of what is pending, this much reached the disk."""
        disk = self.durable.copy()
        for number, extent in sorted(kept.items()):
            disk.apply(self.pending[number], extent=extent)
        after = "nothing" if self.last is None else f"{self.last.kind} {self.last.path}"
        return State(
            disk=disk, acknowledged=self.acknowledged, after=after, kept=f"{kept} of {len(self.pending)} pending steps"
        )


@dataclass(frozen=True, kw_only=True)
class State:
    """One state that a power cut may leave."""

    disk: Disk = field(repr=False)
    acknowledged: frozenset[str]
    after: str
    """The last step before the power cut."""
    kept: str
    """Which of the steps that were not durable yet reached the disk."""


class Recorder:
    """Follows the steps of a process under ``place`` and keeps every moment."""

    def __init__(self, place: Path, *, acknowledged: frozenset[str]) -> None:
        """Take what is under ``place`` as durable."""
        self.moments: list[Moment] = []
        self._acknowledged = acknowledged
        self._place = place
        self._durable, self._live = Disk(), Disk()
        self._pending: list[Effect] = []
        self._count = 0
        for parent, folders, files in os.walk(place):
            for name in [*folders, *files]:
                effect = self._new_name(Path(parent, name), is_folder=name in folders)
                for disk in (self._durable, self._live):
                    disk.apply(effect)
                    if name in files:
                        disk.contents[self._count] = Path(parent, name).read_bytes()
        self._keep(None)

    def acknowledge(self, *what: str) -> None:
        """Take note of what must hold from now on."""
        self._acknowledged |= set(what)
        self.moments[-1] = replace(self.moments[-1], acknowledged=self._acknowledged)

    @contextmanager
    def following(
        self, *, stop: Point | None = None, steps: Callable[[React], AbstractContextManager[object]] = intercept
    ) -> Iterator[None]:
        """Follow what is done within the block; from ``stop`` on nothing is done any more, as after a kill.

        ``steps`` shows each step to a function: those of local stores, or of something else.
        """
        stopping = None if stop is None else stop_at(stop)

        def react(step: Step) -> None:
            if stopping is not None:
                stopping(step)
            self._take(step)

        with steps(react), suppress(Killed):
            yield

    def _take(self, step: Step) -> None:
        path = step.path
        if not path.is_relative_to(self._place):
            return
        if step.kind in ("sync file", "sync folder"):
            number = self._number(path)
            for effect in self._pending:
                if effect.synced_by == number:
                    self._durable.apply(effect)
            self._pending = [effect for effect in self._pending if effect.synced_by != number]
        elif step.kind != "chmod" and self._will_work(step):
            effect = self._effect(step)
            self._live.apply(effect)
            self._pending.append(effect)
        self._keep(step)

    def _will_work(self, step: Step) -> bool:
        """Tell whether the step, which is yet to be taken, succeeds."""
        if step.kind in ("create", "mkdir", "link"):
            return not os.path.lexists(step.target or step.path)
        return step.path.exists()

    def _effect(self, step: Step) -> Effect:
        path, target = step.path, step.target
        if step.kind in ("create", "mkdir"):
            return self._new_name(path, is_folder=step.kind == "mkdir")
        if step.kind == "write":
            number, data = self._number(path), b"".join(step.buffers)
            return Effect(synced_by=number, file=number, offset=len(self._live.contents.get(number, b"")), data=data)
        if step.kind in ("unlink", "rmdir"):
            folder = self._number(path.parent)
            return Effect(synced_by=folder, names=((folder, path.name, None),))
        assert target is not None
        folder, number = self._number(target.parent), self._number(path)
        names: list[tuple[int, str, int | None]] = [(folder, target.name, number)]
        if step.kind == "replace":
            names.append((self._number(path.parent), path.name, None))
        return Effect(synced_by=folder, names=tuple(names))

    def _new_name(self, path: Path, *, is_folder: bool) -> Effect:
        self._count += 1
        folder = self._number(path.parent)
        return Effect(synced_by=folder, names=((folder, path.name, self._count),), makes_folder=is_folder)

    def _number(self, path: Path) -> int:
        return self._live.number_of(path.relative_to(self._place))

    def _keep(self, last: Step | None) -> None:
        moment = Moment(
            durable=self._durable.copy(), pending=tuple(self._pending), acknowledged=self._acknowledged, last=last
        )
        self.moments.append(moment)


def states_of(moments: Iterable[Moment], *, chooser: random.Random, most: int | None = None) -> list[State]:
    """Return the states that a power cut at these moments may leave, each once for what is acknowledged by then.

    With ``most``, no more than so many of each moment, chosen at random.
    """
    return distinct(
        moment.state(kept)
        for moment in moments
        for choices in [list(_choices(moment.pending, chooser=chooser))]
        for kept in (choices if most is None else chooser.sample(choices, min(most, len(choices))))
    )


def distinct(states: Iterable[State]) -> list[State]:
    """Leave out states that were there before with as much acknowledged."""
    found: dict[tuple[str, frozenset[str]], State] = {}
    for state in states:
        found.setdefault((state.disk.digest(), state.acknowledged), state)
    return list(found.values())


def _choices(pending: Sequence[Effect], *, chooser: random.Random) -> Iterator[dict[int, Extent]]:
    """Yield which effects reach the disk: none, all, each alone, all but one, a torn one among all, some at random."""
    whole: dict[int, Extent] = dict.fromkeys(range(len(pending)), "whole")
    yield {}
    yield whole
    torn: tuple[Extent, ...] = ("half", "zeros")
    for number, effect in enumerate(pending):
        yield {number: "whole"}
        yield {other: extent for other, extent in whole.items() if other != number}
        if effect.data:
            yield from (whole | {number: extent} for extent in torn)
    for _ in range(_RANDOM_SUBSETS):
        yield {number: chooser.choice(("whole", "whole", *torn)) for number in whole if chooser.random() < 0.5}
