"""Whatever a power cut leaves of unsynced names and bytes, training resumes from the newest checkpoint that counts."""

import io
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import checkpoint
from distill.checkpoint import Record, find_checkpoint, save_checkpoint
from distill.processes import Processes
from teacher_cache import durable_files
from teacher_cache.errors import CheckpointError
from tests.reliability.crash_states import Recorder, State, states_of
from tests.reliability.processes import quick_folder
from tests.reliability.shim import InlineExecutor, Kind, React, ShutilShim, Step

ALONE = Processes(rank=0, world_size=1, device=torch.device("cpu"))
IDENTITY, LAYOUT = {"seed": 0}, {"backend": "zero3", "world_size": 1}
LAST_STEP, KEEP = 4, 2
LEAST_STATES = 120
FILES = ("model.pt", "states/optimizer.pt")


class Engine:
    """Writes two files, as a backend does: synced by nobody."""

    def __init__(self, step: int) -> None:
        self.step = step

    def save(self, tag: Path) -> None:
        (tag / "states").mkdir()
        for name in FILES:
            with (tag / name).open("wb") as file:
                file.write(content(self.step, name))


def content(step: int, name: str) -> bytes:
    return f"{name} after {step} steps".encode()


def save(place: Path, step: int) -> None:
    record = Record(step=step, identity=IDENTITY, layout=LAYOUT, origin={}, state={})
    engine: Any = Engine(step)
    save_checkpoint(engine, folder(place), record=record, processes=ALONE, keep=KEEP)


def folder(place: Path) -> Path:
    return place / "training" / "small" / "align" / "checkpoints"


class WrittenFile(io.FileIO):
    """A file whose writes are steps."""

    react: React
    path: Path

    def write(self, data: Any) -> int:
        self.react(Step(number=0, kind="write", path=self.path, buffers=[memoryview(data)]))
        return super().write(data)


@contextmanager
def steps_of_python(react: React) -> Iterator[None]:
    """Show the steps of everything that changes files through pathlib, open and os."""
    real_open = Path.open

    def open_path(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if mode != "wb":
            return real_open(path, mode, *arguments, **options)
        react(Step(number=0, kind="create", path=path))
        file = WrittenFile(path, "wb")
        file.react, file.path = react, path
        return file

    def show(kind: Kind, name: str) -> None:
        real = getattr(os, name)

        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            target = Path(arguments[0]) if kind == "replace" else None
            if kind != "mkdir" or (not os.path.lexists(path) and Path(path).parent.is_dir()):
                react(Step(number=0, kind=kind, path=Path(path), target=target))
            return real(path, *arguments, **options)

        patch.setattr(os, name, call)

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        react(Step(number=0, kind="sync folder" if path.is_dir() else "sync file", path=path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", open_path)
        patch.setattr(os, "fsync", fsync)
        for kind, name in (("mkdir", "mkdir"), ("replace", "replace"), ("replace", "rename")):
            show(kind, name)  # type: ignore[arg-type]
        for kind in ("unlink", "rmdir"):
            show(kind, kind)  # type: ignore[arg-type]
        shim: Any = os
        patch.setattr(durable_files, "shutil", _Trees(shim))
        # so that the order of the steps is always the same
        patch.setattr(durable_files, "ThreadPoolExecutor", InlineExecutor)
        yield


class _Trees(ShutilShim):
    def rmtree(self, top: Path, ignore_errors: bool = False) -> None:
        super().rmtree(top)


def record_saves() -> list[State]:
    with quick_folder() as place:
        recorder = Recorder(place, acknowledged=frozenset())
        with recorder.following(steps=steps_of_python):
            for step in range(1, LAST_STEP + 1):
                save(place, step)
                recorder.acknowledge(str(step))
        return states_of(recorder.moments, chooser=random.Random(0))


def require_resumable(place: Path, *, least: int) -> int:
    """Check that what is resumed is whole and no older than what was acknowledged; return its step."""
    found = find_checkpoint(folder(place), identity=IDENTITY, layout=LAYOUT, processes=ALONE)
    if found is None:
        assert least == 0
        return 0
    assert found.step >= least
    for name in FILES:
        assert (found.directory / name).read_bytes() == content(found.step, name)
    return found.step


def recover_all() -> list[int]:
    """Resume and go on from every state; return the steps that were resumed."""
    steps = []
    for state in record_saves():
        with quick_folder() as place:
            state.disk.write_to(place)
            steps.append(require_resumable(place, least=max(map(int, state.acknowledged), default=0)))
            save(place, steps[-1] + 1)
            assert require_resumable(place, least=steps[-1] + 1) == steps[-1] + 1
    return steps


def test_no_state_after_a_power_cut_loses_an_acknowledged_checkpoint() -> None:
    steps = recover_all()
    print(f"R2: checkpoints: {len(steps)} states after a power cut: 0 lost, 0 damaged ones resumed")
    assert len(steps) >= LEAST_STATES
    assert set(steps) == set(range(LAST_STEP + 1))


@pytest.mark.parametrize(
    ("name", "without_sync"),
    [
        ("sync_names_above", lambda path: None),
        ("sync_folder", lambda path: None),
        ("sync_folders", lambda tag: None),
        ("sync_files", lambda tag, names: {name: durable_files.digest_file(tag / name) for name in names}),
    ],
)
def test_a_sync_that_is_forgotten_is_noticed(name: str, without_sync: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, name, without_sync)
    with pytest.raises((AssertionError, CheckpointError)):
        recover_all()
