"""Snapshots that are asked for by number, and what happens when one, or a part of the plan, was lost."""

from pathlib import Path

import pytest

from teacher_cache import open_cache
from teacher_cache.errors import CacheCorrupt, CacheError, CacheIncomplete
from teacher_cache.gc import collect_garbage
from teacher_cache.repair import repair_cache
from teacher_cache.verify import verify_cache
from tests.teacher_cache.store import assert_same, build, flip_bit, make_samples, open_builder

SAMPLES = make_samples(4)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A cache that was extended twice, by one sample each: three snapshots."""
    for count in (1, 2, 3):
        build(tmp_path / "cache", SAMPLES[:count], per_shard=1, extend=True)
    return tmp_path / "cache"


def require_latest(root: Path, *, count: int) -> None:
    cache = open_cache(str(root))
    assert cache.sample_ids == tuple(sample.sample_id for sample in SAMPLES[:count])
    for found, sample in zip(cache.read(cache.sample_ids), SAMPLES, strict=False):
        assert_same(found, sample)
    collect_garbage(str(root))  # the index of a lost snapshot is named by nothing
    assert verify_cache(str(root)).ok


def test_older_snapshots_stay_and_unknown_ones_are_named(root: Path) -> None:
    assert [len(open_cache(str(root), snapshot=number)) for number in range(3)] == [1, 2, 3]
    for number in (3, -1):
        with pytest.raises(CacheError, match=f"has no snapshot {number}; its latest is 2") as caught:
            open_cache(str(root), snapshot=number)
        assert not isinstance(caught.value, CacheCorrupt)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_an_extension_is_seen_although_a_snapshot_was_lost(root: Path, lost: int) -> None:
    (root / "snapshots" / f"{lost:08}.json").unlink()
    build(root, SAMPLES, per_shard=1, extend=True)
    require_latest(root, count=4)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_repair_is_seen_although_a_snapshot_was_lost(root: Path, lost: int) -> None:
    (root / "snapshots" / f"{lost:08}.json").unlink()
    (damaged,) = root.glob("shards/00000-*/hidden_states/c.0.0")
    flip_bit(damaged, byte=3, bit=1)
    assert repair_cache(str(root)).withdrawn_shards == ("00000",)
    build(root, SAMPLES[:3], per_shard=1)
    require_latest(root, count=3)


def test_a_lost_part_of_the_plan_drops_no_samples(root: Path) -> None:
    (root / "plans" / "000002.json").unlink()
    assert [problem.path for problem in repair_cache(str(root)).beyond_repair] == ["plans/000002.json"]
    with pytest.raises(CacheCorrupt, match=r"plans/000002\.json is missing"):
        build(root, SAMPLES[:2], per_shard=1)
    assert len(open_cache(str(root))) == 3

    records = {path: path.stat().st_mtime_ns for path in (root / "commits").iterdir()}
    build(root, SAMPLES[:3], per_shard=1, extend=True)
    assert {path: path.stat().st_mtime_ns for path in (root / "commits").iterdir()} == records
    require_latest(root, count=3)


def test_a_repair_says_that_it_wrote_a_snapshot_only_when_it_did(root: Path) -> None:
    (root / "commits" / "00001.0.json").unlink()
    for index in (root / "index").iterdir():
        flip_bit(index, byte=200, bit=1)
    assert not repair_cache(str(root)).rewritten
    build(root, SAMPLES[:3], per_shard=1)
    require_latest(root, count=3)


@pytest.mark.parametrize("name", ["00000.².json", "00000.٣.json", "00000.007.json", "00000.json", "00000..json"])
def test_files_that_are_no_records_are_not_taken_for_records(root: Path, name: str) -> None:
    (root / "commits" / name).write_text("text")
    assert len(open_cache(str(root), allow_incomplete=True)) == 3
    assert [problem.path for problem in verify_cache(str(root)).problems] == [f"commits/{name}"]


@pytest.mark.parametrize("length", [0, 1])
def test_a_snapshot_is_never_made_on_a_damaged_index(tmp_path: Path, length: int) -> None:
    root = tmp_path / "cache"
    build(root, SAMPLES[:2], per_shard=1)
    (index,) = (root / "index").iterdir()
    (root / "snapshots" / "00000000.json").unlink()
    if length:
        flip_bit(index, byte=300, bit=2)
    else:
        index.write_bytes(b"")
    assert repair_cache(str(root)).rewritten
    require_latest(root, count=2)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_repair_closes_a_gap_while_an_extension_is_under_way(root: Path, lost: int) -> None:
    open_builder(root, SAMPLES, per_shard=1, extend=True)
    flip_bit(root / "snapshots" / f"{lost:08}.json", byte=40, bit=1)
    repair_cache(str(root))
    (left,) = verify_cache(str(root)).problems
    assert left.path.startswith("index/"), "of the lost snapshot, or of one that a builder is about to write"
    assert len(open_cache(str(root))) == 3
    build(root, SAMPLES, per_shard=1)
    require_latest(root, count=4)


def test_an_attempt_that_finds_the_standing_record_gone_says_so(root: Path) -> None:
    writer = open_builder(root, SAMPLES[:3], per_shard=1)
    with writer.start_shard("00000") as attempt:
        attempt.append(SAMPLES[0])
        (root / "commits" / "00000.0.json").unlink()
        with pytest.raises(CacheCorrupt, match="shard 00000: its commit record is gone"):
            attempt.commit(skipped=(), provenance={})


def test_records_show_that_a_generation_of_the_plan_is_lost(root: Path) -> None:
    lost = root / "plans" / "000002.json"
    data = lost.read_bytes()
    lost.unlink()
    (root / "snapshots" / "00000002.json").unlink()
    with pytest.raises(CacheCorrupt, match=r"plans/000002\.json is missing: no plan names .* commits/00002\.0\.json"):
        build(root, SAMPLES[:2], per_shard=1)
    assert [problem.path for problem in repair_cache(str(root)).beyond_repair] == ["plans/000002.json"]
    lost.write_bytes(data)
    build(root, SAMPLES[:3], per_shard=1)
    require_latest(root, count=3)


def test_a_lost_manifest_and_an_unwritten_snapshot_are_named(root: Path) -> None:
    for snapshot in (root / "snapshots").iterdir():
        snapshot.unlink()
    with pytest.raises(CacheIncomplete, match="its snapshot is not written yet"):
        open_cache(str(root))
    (root / "CACHE.json").unlink()
    with pytest.raises(CacheCorrupt, match=r"CACHE\.json is missing from what was a cache"):
        build(root, SAMPLES[:3], per_shard=1)
