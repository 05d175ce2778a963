"""R10: whoever opens a cache while it is built, extended, tidied and repaired sees whole shards and right rows."""

import random
import time
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from teacher_cache import TeacherCache, open_cache
from teacher_cache.errors import CacheCorrupt, CacheIncomplete, CacheNotFound
from teacher_cache.gc import collect_garbage
from teacher_cache.repair import repair_cache
from tests.reliability.processes import quick_folder, run_together
from tests.teacher_cache.store import assert_same, build, commit, flip_bit, make_samples, open_builder

SAMPLES = {sample.sample_id: sample for sample in make_samples(6)}
ALL = list(SAMPLES.values())
FIRST = ALL[:4]
PER_SHARD = 2
DAMAGED_SHARD = "00000"
PAUSE_S = 0.02
READERS = 2


class Shared:
    """What the processes tell each other."""

    def __init__(self, folder: Path, *, least_opens: int) -> None:
        context = get_context("fork")
        self.folder = folder
        self.least_opens = least_opens
        self.opens: Any = context.Value("i", 0)
        self.life: Any = context.Value("i", 0)
        """Number of the cache that is being built."""
        self.damaged_life: Any = context.Value("i", -1)
        """Number of the last cache that was damaged."""
        self.done: Any = context.Event()

    def root(self, life: int) -> Path:
        return self.folder / str(life)


def lead(shared: Shared) -> None:
    """Let caches live: build, extend, tidy, damage, repair, build again."""
    while shared.opens.value < shared.least_opens and not shared.done.is_set():
        root = shared.root(shared.life.value)
        writer = open_builder(root, FIRST, per_shard=PER_SHARD)
        for shard in writer.missing_shards():
            commit(writer, shard, ALL)
            collect_garbage(str(root))
            time.sleep(PAUSE_S)
        build(root, ALL, per_shard=PER_SHARD, extend=True)
        collect_garbage(str(root))
        time.sleep(PAUSE_S)
        shared.damaged_life.value = shared.life.value
        for path in root.glob(f"shards/{DAMAGED_SHARD}-*/hidden_states/c.0.0"):
            flip_bit(path, byte=3, bit=1)
        assert repair_cache(str(root)).withdrawn_shards == (DAMAGED_SHARD,)
        time.sleep(PAUSE_S)
        build(root, ALL, per_shard=PER_SHARD)
        collect_garbage(str(root))
        time.sleep(PAUSE_S)
        shared.life.value += 1
    shared.done.set()


def follow(shared: Shared) -> None:
    """Build and tidy the same caches, so that attempts are lost and files go at any moment."""
    while not shared.done.is_set():
        root = shared.root(shared.life.value)
        with suppress(CacheNotFound):
            collect_garbage(str(root))
            build(root, ALL, per_shard=PER_SHARD, extend=True)


class Reader:
    """Looks at one cache again and again."""

    def __init__(self, shared: Shared, life: int) -> None:
        self.shared, self.life, self.uri = shared, life, str(shared.root(life))
        self.committed = self.complete = 0
        self.snapshot = -1
        self.kept: TeacherCache | None = None
        """The first complete state that was seen, held open."""

    def look(self) -> None:
        may_lack = self.may_be_damaged()
        committed = self.open(allow_incomplete=True)
        if committed is not None:
            may_lack = may_lack or self.may_be_damaged()
            self.require_right(committed)
            assert len(committed) + (PER_SHARD if may_lack else 0) >= self.committed, "committed samples are gone"
            self.committed = max(self.committed, len(committed))
        complete = self.open()
        if complete is not None:
            assert complete.snapshot is not None
            assert (complete.snapshot, len(complete)) >= (self.snapshot, self.complete), "an older state is back"
            self.snapshot, self.complete = complete.snapshot, len(complete)
            self.kept = self.kept or complete
            self.require_right(complete)
        if self.kept is not None:
            self.require_right(self.kept)
            first = self.open(snapshot=0)
            assert first is not None
            self.require_right(first)

    def open(self, **options: Any) -> TeacherCache | None:
        with self.shared.opens.get_lock():
            self.shared.opens.value += 1
        try:
            return open_cache(self.uri, **options)
        except CacheNotFound:
            assert self.committed == 0, "the cache is gone"
        except CacheIncomplete:
            assert self.complete == 0, "the complete cache is incomplete"
        return None

    def require_right(self, cache: TeacherCache) -> None:
        """Check that only whole shards are there, in order, and that a sample of each is right."""
        shards = [list(cache.sample_ids[start : start + PER_SHARD]) for start in range(0, len(cache), PER_SHARD)]
        planned = [list(SAMPLES)[start : start + PER_SHARD] for start in range(0, len(ALL), PER_SHARD)]
        assert shards == [shard for shard in planned if shard in shards]
        for shard in shards:
            self.require_sample(cache, random.choice(shard))

    def require_sample(self, cache: TeacherCache, sample_id: str) -> None:
        refused = ""
        try:
            assert_same(cache.read([sample_id])[0], SAMPLES[sample_id])
        except CacheCorrupt as error:
            refused = str(error)
        assert not refused or (self.may_be_damaged() and f"shard {DAMAGED_SHARD}, sample {sample_id!r}" in refused)

    def may_be_damaged(self) -> bool:
        return bool(self.shared.damaged_life.value >= self.life)


def watch(shared: Shared) -> None:
    """Look at the cache that is being built, from before it is there until after its end."""
    while not shared.done.is_set():
        reader = Reader(shared, shared.life.value)
        while shared.life.value == reader.life and not shared.done.is_set():
            reader.look()


@pytest.mark.parametrize("opens", [1000, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.nightly])])
def test_readers_see_whole_shards_and_right_rows(opens: int) -> None:
    with quick_folder() as folder:
        shared = Shared(folder, least_opens=opens)
        acts = [lead, follow, *[watch] * READERS]
        run_together([partial(act, shared) for act in acts], on_failure=shared.done.set)
    lives = shared.life.value
    assert shared.opens.value >= opens
    assert lives >= 2
    print(
        f"R10: {shared.opens.value} opens by {READERS} readers during {lives} caches built by 2 builders: only whole "
        "shards, no count went back, old snapshots stayed readable, all rows right"
    )
