"""R12: what killed builders leave behind is removed, nothing else is, and a builder that is at work does not mind."""

import itertools
import random
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from teacher_cache import open_cache, writer
from teacher_cache.claims import Claims
from teacher_cache.gc import GcReport, collect_garbage
from teacher_cache.inspect import cache_status
from teacher_cache.storage import open_store
from teacher_cache.verify import verify_cache
from tests.reliability.checks import leftovers
from tests.reliability.processes import quick_folder, run_in_child
from tests.reliability.scenarios import Acknowledge, ignore
from tests.reliability.shim import Point, intercept, kill_at
from tests.teacher_cache.store import assert_same, commit, make_samples, open_builder

SAMPLES = {sample.sample_id: sample for sample in make_samples(8)}
STEPS_OF_A_SHARD = 90
KILLS_PER_CACHE = 25
LEASE_S = 1000.0


@dataclass(frozen=True, kw_only=True)
class Littered:
    """A cache whose builders were killed one after the other."""

    root: Path
    told: frozenset[str]
    """Samples that were acknowledged."""
    kills: int


def work(root: Path, tell: Acknowledge) -> None:
    """Build what is missing, shard by shard, each under a claim; those of dead builders have expired."""
    builder = open_builder(root, list(SAMPLES.values()), per_shard=1)
    clock = itertools.count(step=LEASE_S)
    with Claims(open_store(str(root)), lease_s=LEASE_S, clock=lambda: next(clock)) as claims:
        for shard in builder.missing_shards():
            if claims.take(shard.shard_id) or claims.take(shard.shard_id):
                commit(builder, shard, list(SAMPLES.values()))
                tell(*shard.sample_ids)
                claims.release(shard.shard_id)


def litter(root: Path, *, chooser: random.Random) -> Littered:
    """Kill builders of one cache at random steps, until it is nearly complete."""
    told: set[str] = set()
    kills = 0
    while kills < KILLS_PER_CACHE and len(told) < len(SAMPLES) - 2:
        kills += 1
        point = Point(number=chooser.randint(1, STEPS_OF_A_SHARD), torn=chooser.random() < 0.5)

        def doomed(tell: Acknowledge, point: Point = point) -> None:
            with intercept(kill_at(point)):
                work(root, tell)

        status, words = run_in_child(doomed)
        assert status == -signal.SIGKILL
        told.update(words)
    return Littered(root=root, told=frozenset(told), kills=kills)


def attempts_in(root: Path) -> list[str]:
    return [path.name for path in (root / "shards").glob("*")]


def require_right(root: Path, ids: frozenset[str]) -> None:
    """Check that these samples are there, and that all that is there is right."""
    cache = open_cache(str(root), allow_incomplete=True)
    assert ids <= set(cache.sample_ids)
    for found in cache.read(cache.sample_ids):
        assert_same(found, SAMPLES[found.sample_id])


def require_clean(root: Path) -> None:
    """Check a complete cache: all samples, and no file that nothing names."""
    require_right(root, frozenset(SAMPLES))
    assert verify_cache(str(root)).problems == ()
    assert leftovers(root) == []
    assert len(attempts_in(root)) == len(SAMPLES)


def tidy(cache: Littered) -> GcReport:
    """Remove what may go before the cache is complete, and check that it did, and nothing else."""
    report = collect_garbage(str(cache.root))
    require_right(cache.root, cache.told)
    missing = cache_status(str(cache.root)).missing_shards
    names = attempts_in(cache.root)
    kept = [name for name in names if name[:5] in missing]
    assert sorted(report.pending) == sorted(f"shards/{name}" for name in kept)
    assert len(names) - len(kept) == len(SAMPLES) - len(missing)
    assert all(name[:5] in missing for name in leftovers(cache.root)), "a claim or a temporary file is left"
    assert collect_garbage(str(cache.root)).removed == ()
    return report


def finish_alone(cache: Littered) -> GcReport:
    """Complete the cache without the tidying of the build, so that all is left to the collection."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "sweep", lambda *_, **__: None)
        work(cache.root, ignore)
    report = collect_garbage(str(cache.root))
    require_clean(cache.root)
    return report


def finish_while_tidied(cache: Littered) -> int:
    """Complete the cache while another thread collects garbage; return how often it did."""
    done, collections = threading.Event(), 0

    def collect() -> None:
        nonlocal collections
        while not done.is_set():
            collect_garbage(str(cache.root))
            collections += 1

    with ThreadPoolExecutor(1) as pool:
        collecting = pool.submit(collect)
        try:
            work(cache.root, ignore)
        finally:
            done.set()
        collecting.result()
    collect_garbage(str(cache.root))
    require_clean(cache.root)
    return collections


@pytest.mark.parametrize(
    ("kills", "rounds"),
    [
        pytest.param(30, 5, id="short"),
        pytest.param(200, 100, id="long", marks=[pytest.mark.slow, pytest.mark.nightly]),
    ],
)
def test_all_orphans_go_and_nothing_else(kills: int, rounds: int) -> None:
    chooser = random.Random(0)
    caches: list[Littered] = []
    with quick_folder() as folder:
        while sum(cache.kills for cache in caches) < kills:
            caches.append(litter(folder / str(len(caches)), chooser=chooser))
        littered = folder / "littered"
        collections = 0
        for number in range(rounds):
            cache = caches[number % len(caches)]
            shutil.rmtree(littered, ignore_errors=True)
            shutil.copytree(cache.root, littered)
            collections += finish_while_tidied(Littered(root=littered, told=cache.told, kills=cache.kills))
        committed = [cache_status(str(cache.root)).committed_shards for cache in caches]
        orphans = sum(len(attempts_in(cache.root)) for cache in caches) - sum(committed)
        files = sum(len(leftovers(cache.root)) for cache in caches)
        removed = sum(len(tidy(cache).removed) + len(finish_alone(cache).removed) for cache in caches)
    assert orphans > kills // 4
    assert files > kills // 8
    assert removed >= orphans  # of the files, a builder removes the claims that it took over
    print(
        f"R12: {sum(cache.kills for cache in caches)} kills left {orphans} folders and {files} files: all removed, and "
        f"nothing that is named; {collections} collections during {rounds} builds: 0 lost, 0 left"
    )
