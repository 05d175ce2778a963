"""What a verification and a repair make of a cache to which others write meanwhile, and shards withdrawn by name."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from teacher_cache import open_cache, repair, verify
from teacher_cache.errors import CacheError
from teacher_cache.gc import collect_garbage
from teacher_cache.inspect import cache_status
from teacher_cache.local_store import LocalStore
from teacher_cache.repair import repair_cache, withdraw_shards
from teacher_cache.verify import verify_cache
from tests.teacher_cache.store import assert_same, build, commit, flip_bit, make_samples, open_builder

SAMPLES = make_samples(6)
Act = Callable[[Path], object]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A complete cache of two shards."""
    build(tmp_path / "cache", SAMPLES[:4])
    return tmp_path / "cache"


def extend(root: Path) -> None:
    build(root, SAMPLES, extend=True)


def begin_to_extend(root: Path) -> None:
    writer = open_builder(root, SAMPLES, per_shard=1, extend=True)
    commit(writer, writer.missing_shards()[0], SAMPLES)


def drop_question_rows(root: Path) -> None:
    collect_garbage(str(root), drop_question_rows=True)


def damage(root: Path) -> Path:
    (path,) = root.glob("shards/00001-*/hidden_states/c.0.0")
    flip_bit(path, byte=3, bit=1)
    return path


def repair_and_build(root: Path) -> None:
    assert repair_cache(str(root)).withdrawn_shards == ("00001",)
    build(root, SAMPLES[:4])


def meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Have somebody act once the plan, the snapshots and the records were read, before the first shard is checked."""
    actions = [act]
    check = verify.check_shard

    def act_then_check(*arguments: Any, **keywords: Any) -> Any:
        while actions:
            actions.pop()()
        return check(*arguments, **keywords)

    monkeypatch.setattr(verify, "_THREADS", 1)
    monkeypatch.setattr(verify, "check_shard", act_then_check)


def files_of(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("act", [extend, begin_to_extend, drop_question_rows])
def test_what_others_write_during_a_verification_is_no_problem(
    root: Path, monkeypatch: pytest.MonkeyPatch, act: Act
) -> None:
    meanwhile(monkeypatch, lambda: act(root))
    assert verify_cache(str(root)).problems == ()


@pytest.mark.parametrize("act", [extend, begin_to_extend, drop_question_rows])
def test_a_repair_keeps_what_others_write_meanwhile(root: Path, monkeypatch: pytest.MonkeyPatch, act: Act) -> None:
    written: set[str] = set()

    def act_and_look() -> None:
        act(root)
        written.update(files_of(root))

    meanwhile(monkeypatch, act_and_look)
    report = repair_cache(str(root))
    assert (report.withdrawn_shards, report.removed, report.rewritten) == ((), (), False)
    assert files_of(root) == written
    extend(root)
    cache = open_cache(str(root))
    assert cache.sample_ids == tuple(sample.sample_id for sample in SAMPLES)
    assert [len(sample.token_ids) for sample in cache.read(cache.sample_ids)] == [24, 25, 26, 27, 28, 29]


def test_damage_that_another_repair_has_mended_is_withdrawn_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(root)
    found = verify_cache

    def verify_then_wait(uri: str) -> Any:
        report = found(uri)
        monkeypatch.undo()
        repair_and_build(root)
        return report

    monkeypatch.setattr(repair, "verify_cache", verify_then_wait)
    report = repair_cache(str(root))
    assert (report.withdrawn_shards, report.removed) == ((), ())
    assert verify_cache(str(root)).problems == ()
    assert cache_status(str(root)).missing_shards == ()


def test_a_shard_that_is_mended_during_a_verification_is_checked_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(root)
    meanwhile(monkeypatch, lambda: repair_and_build(root))
    report = verify_cache(str(root))
    assert (report.problems, report.samples) == ((), 4)


def test_an_index_stays_while_its_snapshot_may_still_come(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = LocalStore.create

    def create_no_snapshot(store: LocalStore, name: str, data: bytes) -> bool:
        if name.startswith("snapshots/"):
            raise OSError(5, "Input/output error")
        return create(store, name, data)

    with monkeypatch.context() as broken:
        broken.setattr(LocalStore, "create", create_no_snapshot)
        with pytest.raises(CacheError, match="the snapshot cannot be written"):
            build(root, SAMPLES[:5], per_shard=1, extend=True)
    indexes = set((root / "index").iterdir())
    assert len(indexes) == 2
    open_builder(root, SAMPLES, per_shard=1, extend=True)
    assert repair_cache(str(root)).removed == ()
    assert set((root / "index").iterdir()) == indexes
    extend(root)
    collect_garbage(str(root))
    assert verify_cache(str(root)).problems == ()


def test_a_stray_index_of_a_complete_cache_goes_and_nothing_is_called_rewritten(root: Path) -> None:
    stray = root / "index" / f"{'0' * 16}.safetensors"
    stray.write_bytes(b"x")
    stray.chmod(0o600)
    report = repair_cache(str(root))
    assert (report.removed, report.rewritten) == ((f"index/{stray.name}",), False)
    assert verify_cache(str(root)).problems == ()


def test_a_shard_is_withdrawn_by_name_and_built_again(root: Path) -> None:
    assert main(["cache", "repair", str(root), "--withdraw", "00001", "--withdraw", "00001"]) == 3
    assert cache_status(str(root)).withdrawn_shards == ("00001",)
    assert withdraw_shards(str(root), ["00001"]).withdrawn_shards == (), "it is to be built already"
    build(root, SAMPLES[:4])
    assert verify_cache(str(root)).problems == ()
    cache = open_cache(str(root))
    for found, sample in zip(cache.read(cache.sample_ids), SAMPLES, strict=False):
        assert_same(found, sample)


def test_no_shard_is_withdrawn_when_one_of_the_names_is_unknown(root: Path) -> None:
    with pytest.raises(CacheError, match="has no shard 00007"):
        withdraw_shards(str(root), ["00001", "00007"])
    assert cache_status(str(root)).withdrawn_shards == ()


@pytest.mark.parametrize("lost", ["commits/00001.0.json", "commits/00001.2.json"])
def test_a_withdrawal_takes_no_revision_that_was_taken_before(root: Path, lost: str) -> None:
    withdraw_shards(str(root), ["00001"])
    build(root, SAMPLES[:4])
    (root / lost).unlink()
    assert withdraw_shards(str(root), ["00001"]).withdrawn_shards == (() if lost.endswith(".2.json") else ("00001",))
    repair_cache(str(root))
    build(root, SAMPLES[:4])
    assert max((root / "commits").glob("00001.*")).name == "00001.4.json"
    assert verify_cache(str(root)).problems == ()


def test_a_damaged_record_is_withdrawn_by_name(root: Path) -> None:
    flip_bit(root / "commits" / "00001.0.json", byte=40, bit=1)
    assert withdraw_shards(str(root), ["00001"]).withdrawn_shards == ("00001",)


def test_missing_shards_and_files_are_matched_in_time_that_does_not_multiply() -> None:
    names = [f"shards/shard-{number:06}-{'0' * 32}/c.0.0" for number in range(10_000)]
    missing = [f"shard-{number:06}" for number in range(5_000, 35_000)]
    began = time.process_time()
    extra = list(verify._extra_names(names, known=set(), undecided=missing))
    assert time.process_time() - began < 1
    assert extra == names[:5_000]
