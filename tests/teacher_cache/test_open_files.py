"""What readers and writers hold open, and what becomes of it in forks, at the end, and after failures."""

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from teacher_cache import open_cache, shard_writer
from teacher_cache.errors import CacheError
from teacher_cache.local_files import LocalWriter
from teacher_cache.local_store import LocalStore
from teacher_cache.object_service import ObjectService
from teacher_cache.schema import SkippedSample
from teacher_cache.storage import FileReader
from tests.reliability.processes import run_in_child
from tests.teacher_cache.store import assert_same, build, make_samples, make_targets, open_builder

PATIENCE_S = 20


def limited(act: Callable[[], object]) -> Callable[[object], None]:
    """Let a child act, and die of a signal when that takes for ever."""

    def acting(_: object) -> None:
        signal.alarm(PATIENCE_S)
        act()

    return acting


def open_files(root: Path) -> list[str]:
    links = [os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd") if _is_open(number)]
    return [link for link in links if link.startswith(str(root))]


def _is_open(number: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{number}")


def test_a_cache_that_is_let_go_closes_its_files_at_once(tmp_path: Path) -> None:
    samples = make_samples(3)
    build(tmp_path / "cache", samples, per_shard=1)
    gc.disable()  # not when the garbage collector comes round
    try:
        cache = open_cache(str(tmp_path / "cache"))
        cache.read(cache.sample_ids)
        assert len(open_files(tmp_path)) > len(samples)
        del cache
        assert open_files(tmp_path) == []
    finally:
        gc.enable()


def test_a_fork_reads_while_another_thread_of_its_parent_opens_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = make_samples(2)
    build(tmp_path / "cache", samples, per_shard=2)
    cache = open_cache(str(tmp_path / "cache"))
    waiting, go_on, open_file = threading.Event(), threading.Event(), LocalStore.open

    def open_slowly(store: LocalStore, name: str) -> FileReader:
        if threading.current_thread() is thread:
            waiting.set()
            go_on.wait()
        return open_file(store, name)

    monkeypatch.setattr(LocalStore, "open", open_slowly)
    thread = threading.Thread(target=lambda: cache.read(["sample-0"]))
    thread.start()
    waiting.wait()
    status, _ = run_in_child(limited(lambda: assert_same(cache.read(["sample-1"])[0], samples[1])))
    go_on.set()
    thread.join()
    assert status == 0
    assert_same(cache.read(["sample-0"])[0], samples[0])


def test_an_interpreter_ends_without_a_word_while_files_are_open(tmp_path: Path) -> None:
    build(tmp_path / "cache", make_samples(2))
    program = "import sys; from teacher_cache import open_cache; c = open_cache(sys.argv[1]); c.read(c.sample_ids)"
    command = [sys.executable, "-c", program, str(tmp_path / "cache")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stderr == ""


def test_a_fork_of_a_fork_lets_go_although_its_parent_reads_objects() -> None:
    def read_then_fork() -> None:
        service = ObjectService("memory://cache")
        assert service.ask("size", "absent") is None
        child = os.fork()
        if child == 0:
            signal.alarm(PATIENCE_S)
            del service
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    assert run_in_child(limited(read_then_fork))[0] == 0


def test_an_attempt_that_failed_to_write_is_never_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [make_targets(f"sample-{number}", num_tokens=2000, seed=number) for number in range(12)]
    writer = open_builder(tmp_path / "cache", samples, per_shard=len(samples))
    write, failed = LocalWriter.write, threading.Event()

    def fail_once(file: LocalWriter, buffers: Sequence[memoryview]) -> None:
        if not failed.is_set():
            failed.set()
            raise OSError(28, "no space left")
        write(file, buffers)

    monkeypatch.setattr(shard_writer, "_BATCH_BYTES", 64)
    monkeypatch.setattr(LocalWriter, "write", fail_once)
    skipped = []
    with writer.start_shard("00000") as attempt:
        for sample in samples:
            try:
                attempt.append(sample)
            except CacheError as error:
                skipped.append(SkippedSample(sample_id=sample.sample_id, reason="refused", message=str(error)))
        assert skipped
        with pytest.raises(CacheError, match="no space left"):
            attempt.commit(skipped=skipped, provenance={})
    assert [shard.shard_id for shard in writer.missing_shards()] == ["00000"]
    assert list((tmp_path / "cache" / "shards").iterdir()) == []
