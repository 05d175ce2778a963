"""Processes that die at each file-system operation, and processes that meet at the commit point."""

import errno
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teacher_cache import open_cache
from teacher_cache.errors import CacheError
from teacher_cache.inspect import cache_status
from teacher_cache.verify import verify_cache
from tests.teacher_cache.store import assert_same, build, commit, make_samples, open_builder

SAMPLES = make_samples(4)
FIRST_RENAME = 135


def run_in_child(act: Callable[[], object]) -> int:
    """Fork, act, and return the exit status: 0, or minus the signal that killed the child."""
    child = os.fork()
    if child == 0:
        try:
            act()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def on_each_operation(root: Path, react: Callable[[int], None]) -> None:
    """Call ``react`` with a running number before each operation that changes something under ``root``."""
    count = 0
    fsync = os.fsync

    def operation() -> None:
        nonlocal count
        count += 1
        react(count)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.link", "os.remove", "os.rmdir")
        changes |= event == "os.mkdir" and not os.path.isdir(args[0])
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (changes or writes) and str(args[0]).startswith(str(root)):
            operation()

    def counted_fsync(descriptor: int) -> None:
        operation()
        fsync(descriptor)

    os.fsync = counted_fsync
    sys.addaudithook(hook)


def kill_at(root: Path, number: int, act: Callable[[], object]) -> int:
    def react(count: int) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def doomed() -> None:
        on_each_operation(root, react)
        act()

    return run_in_child(doomed)


def require_whole(root: Path) -> None:
    report = verify_cache(str(root))
    assert report.problems == ()
    assert report.missing_shards == ()
    assert cache_status(str(root)).sealed
    assert list((root / "staging").iterdir()) == []
    cache = open_cache(str(root))
    assert cache.sample_ids == tuple(sample.sample_id for sample in SAMPLES)
    for got, sample in zip(cache.read(cache.sample_ids), SAMPLES, strict=True):
        assert_same(got, sample)


@pytest.mark.slow
def test_a_kill_at_any_operation_loses_nothing(tmp_path: Path) -> None:
    """One shard stands; the child commits the other and seals, and dies before its n-th operation."""
    half = tmp_path / "half"
    writer = open_builder(half, SAMPLES)
    commit(writer, writer.missing_shards()[0], SAMPLES)
    acknowledged = open_cache(str(half), allow_incomplete=True).sample_ids
    number, killed = 0, True
    while killed:
        number += 1 if number >= FIRST_RENAME else 5  # all that comes before is writing and syncing files
        root = tmp_path / "cache"
        shutil.copytree(half, root)
        killed = kill_at(root, number, lambda root=root: build(root, SAMPLES)) == -signal.SIGKILL
        cache = open_cache(str(root), allow_incomplete=True)
        assert set(cache.sample_ids) >= set(acknowledged), f"killed at operation {number}"
        for got in cache.read(cache.sample_ids):
            assert_same(got, SAMPLES[int(got.sample_id.removeprefix("sample-"))])
        build(root, SAMPLES)
        require_whole(root)
        shutil.rmtree(root)
    assert number > FIRST_RENAME + 10


def test_a_kill_at_any_operation_of_creating_a_cache_is_harmless(tmp_path: Path) -> None:
    number, killed = 0, True
    while killed:
        number += 1
        root = tmp_path / f"cache-{number}"
        killed = kill_at(root, number, lambda root=root: open_builder(root, SAMPLES)) == -signal.SIGKILL
        assert len(open_builder(root, SAMPLES).missing_shards()) == 2
    assert number > 15
    build(root, SAMPLES)
    require_whole(root)


def test_everything_is_synced_before_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill cannot show a missing fsync, so the order of the operations is checked itself."""
    root = tmp_path / "cache"
    writer = open_builder(root, SAMPLES)
    shard = writer.missing_shards()[0]
    events: list[tuple[str, Path]] = []

    def record(name: str, function: Callable[..., None]) -> Callable[..., None]:
        def recorded(*args: Any) -> None:
            path = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else args[0]
            events.append((name, Path(path)))
            if name != "fsync":
                events.append((f"{name} to", Path(args[1])))
            function(*args)

        return recorded

    for name in ("fsync", "rename", "link"):
        monkeypatch.setattr(os, name, record(name, getattr(os, name)))
    outcome = commit(writer, shard, SAMPLES)
    monkeypatch.undo()

    folder = root / "shards" / f"{shard.shard_id}-{outcome.attempt}"
    moved = events.index(("rename to", folder))
    staged = events[moved - 1][1]
    expected = {staged / path.relative_to(folder) for path in [folder, *folder.rglob("*")]}
    assert {path for name, path in events[:moved] if name == "fsync"} >= expected
    named = events.index(("link to", root / "commits" / f"{shard.shard_id}.json"))
    assert ("fsync", root / "shards") in events[moved:named]
    assert ("fsync", events[named - 1][1]) in events[moved:named]
    assert ("fsync", root / "commits") in events[named:]


def test_writers_that_meet_at_the_commit_point_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for round_ in range(6):
        root = tmp_path / f"cache-{round_}"
        writer = open_builder(root, SAMPLES, per_shard=4)
        barrier, answers = context.Barrier(3), context.SimpleQueue()

        def compete(writer: Any = writer, barrier: Any = barrier, answers: Any = answers) -> None:
            link = os.link

            def meet(source: Any, target: Any, **kwargs: Any) -> None:
                if Path(target).parent.name == "commits":
                    barrier.wait(60)
                link(source, target, **kwargs)

            os.link = meet
            answers.put(commit(writer, writer.missing_shards()[0], SAMPLES).attempt)

        children = [context.Process(target=compete) for _ in range(3)]
        for child in children:
            child.start()
        attempts = {answers.get() for _ in children}
        for child in children:
            child.join()
            assert child.exitcode == 0
        assert [path.name for path in (root / "shards").iterdir()] == [f"00000-{attempts.pop()}"]
        assert not attempts
        require_whole(root)


def test_a_second_commit_returns_the_standing_record(tmp_path: Path) -> None:
    writer = open_builder(tmp_path / "cache", SAMPLES)
    shard = writer.missing_shards()[0]
    first = commit(writer, shard, SAMPLES)
    assert commit(writer, shard, SAMPLES) == first
    assert len(list((tmp_path / "cache" / "shards").iterdir())) == 1


def test_a_lost_answer_of_the_file_system_is_a_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name was given, the answer was lost, the client tried again: it exists, and it is ours."""
    link = os.link

    def link_twice(source: Any, target: Any, **kwargs: Any) -> None:
        link(source, target, **kwargs)
        link(source, target, **kwargs)

    monkeypatch.setattr(os, "link", link_twice)
    build(tmp_path / "cache", SAMPLES)
    monkeypatch.undo()
    require_whole(tmp_path / "cache")


@pytest.mark.parametrize("number", [1, 12, 90, 141, 145])
def test_a_full_disk_is_named_and_the_shard_can_be_tried_again(tmp_path: Path, number: int) -> None:
    root = tmp_path / "cache"
    writer = open_builder(root, SAMPLES, per_shard=4)
    shard = writer.missing_shards()[0]

    def react(count: int) -> None:
        if count == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def act() -> None:
        on_each_operation(root, react)
        with pytest.raises(CacheError, match=r"shard 00000: cannot write \d+ bytes.*No space left on device"):
            commit(writer, shard, SAMPLES)
        assert list((root / "staging").iterdir()) == []

    assert run_in_child(act) == 0
    assert cache_status(str(root)).committed_shards == 0
    build(root, SAMPLES, per_shard=4)
    require_whole(root)
