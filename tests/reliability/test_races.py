"""R9: builders that meet at the same step of the same cache commit each shard exactly once."""

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from teacher_cache import open_cache
from teacher_cache.errors import CacheMismatch
from teacher_cache.ledger import COMMITS
from teacher_cache.local_store import LocalStore
from teacher_cache.manifest import MANIFEST
from teacher_cache.object_store import ObjectStore
from teacher_cache.plan import PLANS
from teacher_cache.schema import TeacherHead
from teacher_cache.snapshot import SNAPSHOTS
from teacher_cache.storage import open_store
from teacher_cache.verify import verify_cache
from tests.reliability.processes import quick_folder, run_together
from tests.teacher_cache.s3_server import BUCKET, start_s3
from tests.teacher_cache.store import IDENTITY, assert_same, build, commit, make_head, make_samples, open_builder

BUILDERS = 3
WAIT_S = 600
SAMPLES = make_samples(3)
RACED = (MANIFEST, COMMITS, f"{PLANS}/000001", SNAPSHOTS)
"""What builders create at the same time."""
Meeting = Callable[[], object]
"""Waits for the others; the same object serves each meeting."""


@contextmanager
def meet_at(meeting: Meeting, *folders: str) -> Iterator[None]:
    """Let each builder wait for the others before it creates a file in one of these folders."""
    with pytest.MonkeyPatch.context() as patch:
        for store in (LocalStore, ObjectStore):

            def create(self: Any, name: str, data: bytes, create: Any = store.create) -> bool:
                if name.startswith(folders):
                    meeting()
                return bool(create(self, name, data))

            patch.setattr(store, "create", create)
        yield


def race(root: str, *, builder: int) -> None:
    """Build a cache in step with others, and check what each commit returns."""
    writer = open_builder(root, SAMPLES[:2], per_shard=1, provenance={"builder": builder})  # type: ignore[arg-type]
    for shard in writer.plan.shards:
        returned = commit(writer, shard, SAMPLES)
        assert returned.attempt == writer.standing_record(shard).attempt
    open_builder(root, SAMPLES, per_shard=1, extend=True)  # type: ignore[arg-type]


def require_one_of_each(uri: str) -> None:
    """Check a cache that several have built: one record and one folder per shard, one snapshot, all bits right."""
    store = open_store(uri)
    cache = open_cache(uri, allow_incomplete=True)
    records = [entry.name for entry in store.list(COMMITS)]
    assert records == [f"commits/{shard_id}.0.json" for shard_id in sorted(cache.shard_ids)]
    assert len(store.folders("shards")) == len(records)
    assert [entry.name for entry in store.list(SNAPSHOTS)] == ["snapshots/00000000.json"]
    assert len(list(store.list(PLANS))) == 2
    assert cache.sample_ids == ("sample-0", "sample-1")
    for found, sample in zip(cache.read(cache.sample_ids), SAMPLES, strict=False):
        assert_same(found, sample)
    report = verify_cache(uri)
    assert (report.problems, report.missing_shards) == ((), ("00002",))
    assert list(store.list("staging")) == []


def race_in_processes(act: Callable[[int, int], None], *, builders: int, rounds: int, raced: Sequence[str]) -> None:
    """Let processes act together, round after round; ``act`` takes the round and the builder."""
    barrier = get_context("fork").Barrier(builders)

    def labour(builder: int) -> None:
        with meet_at(lambda: barrier.wait(WAIT_S), *raced):
            for number in range(rounds):
                act(number, builder)
                barrier.wait(WAIT_S)

    run_together([partial(labour, builder) for builder in range(builders)], on_failure=barrier.abort)


@pytest.mark.parametrize("rounds", [100, pytest.param(1000, marks=pytest.mark.nightly)])
def test_three_builders_meet_at_every_create(rounds: int) -> None:
    with quick_folder() as folder:
        race_in_processes(
            lambda number, builder: race(str(folder / str(number)), builder=builder),
            builders=BUILDERS,
            rounds=rounds,
            raced=RACED,
        )
        builders = set()
        for number in range(rounds):
            require_one_of_each(str(folder / str(number)))
            builders.add(open_cache(str(folder / str(number)), allow_incomplete=True).provenance["builder"])
    assert len(builders) > 1, "there was no race: one builder always won"
    print(f"R9: {rounds} rounds of {BUILDERS} builders, met at 5 creates each: 0 lost, 0 duplicate, 1 record a shard")


def test_three_builders_meet_in_an_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = 2
    with start_s3(monkeypatch):
        for number in range(rounds):
            uri = f"s3://{BUCKET}/races/{number}"
            barrier = threading.Barrier(BUILDERS)

            def labour(builder: int, uri: str = uri, barrier: threading.Barrier = barrier) -> None:
                try:
                    race(uri, builder=builder)
                except BaseException:
                    barrier.abort()
                    raise

            with meet_at(lambda barrier=barrier: barrier.wait(WAIT_S), *RACED), ThreadPoolExecutor(BUILDERS) as pool:
                errors = [one.exception() for one in [pool.submit(labour, builder) for builder in range(BUILDERS)]]
            # the others only wait in vain for the one that failed
            raise_first(error for error in errors if not isinstance(error, threading.BrokenBarrierError))
            raise_first(errors)
            require_one_of_each(uri)
    print(f"R9: {rounds} rounds of {BUILDERS} builders on S3: 0 lost, 0 duplicate, 1 record a shard")


def raise_first(errors: Iterable[BaseException | None]) -> None:
    for error in filter(None, errors):
        raise error


def other_head() -> TeacherHead:
    return replace(make_head(), logit_scale=0.5)


CONFIGURATIONS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "identity": ({}, {"identity": {**IDENTITY, "tap": "before-norm"}, "head": other_head()}, "tap: stored"),
    "codec": ({}, {"codec": "fp8"}, "codec: stored"),
    "samples": ({}, {"samples": SAMPLES[1:]}, "planned for other samples"),
}
"""Two builders, and what the one that comes second is told."""


def open_one(root: Path, options: dict[str, Any]) -> None:
    open_builder(root, **{"samples": SAMPLES[:2], "per_shard": 1, **options})


def build_one(root: Path, options: dict[str, Any]) -> None:
    build(root, **{"samples": SAMPLES[:2], "per_shard": 1, **options})


@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("moment", ["before", "within"])
def test_the_second_of_two_configurations_is_refused(
    tmp_path: Path, configuration: str, turned: bool, moment: str
) -> None:
    *both, told = CONFIGURATIONS[configuration]
    first, second = reversed(both) if turned else both
    alone, root = tmp_path / "alone", tmp_path / "cache"
    open_one(alone, first)
    if moment == "before":
        open_one(root, first)
    with (
        meet_at(once(lambda: open_one(root, first)), *([MANIFEST] if moment == "within" else [])),
        pytest.raises(CacheMismatch, match=told),
    ):
        open_one(root, second)
    require_nothing_left(root, alone)
    build_one(alone, first)
    build_one(root, first)
    require_nothing_left(root, alone)


def test_the_second_of_two_extensions_is_refused(tmp_path: Path) -> None:
    alone, root = tmp_path / "alone", tmp_path / "cache"
    mine, theirs = SAMPLES[::2], SAMPLES[:2]
    for place in (alone, root):
        build(place, SAMPLES[:1], per_shard=1)
    build(alone, theirs, per_shard=1, extend=True)
    with (
        meet_at(once(lambda: build(root, theirs, per_shard=1, extend=True)), f"{PLANS}/000001"),
        pytest.raises(CacheMismatch, match="another builder planned other samples"),
    ):
        build(root, mine, per_shard=1, extend=True)
    require_nothing_left(root, alone)


@pytest.mark.parametrize("rounds", [12, pytest.param(300, marks=pytest.mark.nightly)])
def test_one_of_two_configurations_wins(rounds: int) -> None:
    configurations = [{}, CONFIGURATIONS["identity"][1]]
    with quick_folder() as folder:

        def act(number: int, builder: int) -> None:
            root = folder / str(number)
            try:
                build_one(root, configurations[builder])
            except CacheMismatch as error:
                (folder / f"{number}-refused-{builder}").write_text(str(error))

        race_in_processes(act, builders=2, rounds=rounds, raced=[MANIFEST])
        for number in range(rounds):
            build_one(folder / f"{number}-alone", {})
            require_nothing_left(folder / str(number), folder / f"{number}-alone")
        refusals = {path.name: path.read_text() for path in folder.glob("*-refused-*")}
    assert len(refusals) == rounds
    assert all("tap: stored" in message for message in refusals.values())
    losses = sum(name.endswith("0") for name in refusals)
    print(f"R9: {rounds} rounds of 2 configurations: one refused each time, the first {losses} times")


def once(act: Callable[[], None]) -> Callable[[], None]:
    """Return what acts at its first call alone."""
    acts = iter([act])
    return lambda: next(acts, lambda: None)()


def require_nothing_left(root: Path, alone: Path) -> None:
    """Check that a cache holds no file beside those of one that was built without a race."""
    names = [
        [re.sub("[0-9a-f]{16,}", "digest", entry.name) for entry in open_store(str(place)).list("")]
        for place in (root, alone)
    ]
    assert sorted(names[0]) == sorted(names[1])
    assert verify_cache(str(root)).problems == ()
