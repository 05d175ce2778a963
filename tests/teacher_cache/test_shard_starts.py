"""Starting a shard: what it asks the store, and what it finds when others have committed or repaired meanwhile."""

from pathlib import Path

import pytest

from teacher_cache.build_plan import open_builder as open_teacher_builder
from teacher_cache.errors import CacheError, CacheMismatch
from teacher_cache.ledger import COMMITS, record_name
from teacher_cache.local_store import LocalStore
from teacher_cache.repair import withdraw_shards
from teacher_cache.samples import read_samples
from teacher_cache.shard_worker import ShardReport, ShardWorker
from tests.teacher_cache.store import commit, make_samples, open_builder
from tests.teacher_cache.test_build import make_config


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that were listed."""
    folders: list[str] = []
    list_folder = LocalStore.list

    def remember(store: LocalStore, folder: str) -> object:
        folders.append(folder)
        return list_folder(store, folder)

    monkeypatch.setattr(LocalStore, "list", remember)
    return folders


def test_records_are_listed_once_for_all_shards_of_a_writer(tmp_path: Path, listings: list[str]) -> None:
    samples = make_samples(40)
    writer = open_builder(tmp_path / "cache", samples, per_shard=1)
    listings.clear()
    for shard in writer.plan.shards:
        with writer.start_shard(shard.shard_id) as attempt:
            assert not attempt.is_done_elsewhere
            (targets,) = [one for one in samples if one.sample_id in shard.sample_ids]
            attempt.append(targets)
            attempt.commit(skipped=(), provenance={})
    assert listings == [COMMITS]
    assert writer.missing_shards() == []


def test_what_others_did_since_the_listing_is_seen(tmp_path: Path) -> None:
    samples = make_samples(6)
    ours = open_builder(tmp_path / "cache", samples, per_shard=1)
    theirs = open_builder(tmp_path / "cache", samples, per_shard=1)
    first, second, *rest = ours.plan.shards
    assert not ours.start_shard(first.shard_id).is_done_elsewhere
    record = commit(theirs, second, samples)
    with ours.start_shard(second.shard_id) as attempt:
        assert attempt.is_done_elsewhere
        assert attempt.commit(skipped=(), provenance={}).attempt == record.attempt

    withdraw_shards(ours.uri, [second.shard_id])
    assert commit(ours, second, samples).revision == 2
    withdraw_shards(ours.uri, [second.shard_id])
    assert commit(theirs, second, samples).revision == 4
    for shard in (first, *rest):
        commit(ours, shard, samples)
    assert ours.missing_shards() == []
    with pytest.raises(CacheMismatch, match="'other' is not planned"):
        ours.start_shard("other")


def test_a_store_that_does_not_answer_is_an_error_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = open_builder(tmp_path / "cache", make_samples(2), per_shard=1)
    writer.start_shard("00000")

    def refuse(*_: object) -> None:
        raise OSError(5, "input/output error")

    monkeypatch.setattr(LocalStore, "size", refuse)
    with pytest.raises(CacheError, match=r"shard 00001: cannot look for its record in .*input/output error"):
        writer.start_shard("00001")


def test_a_worker_reads_the_manifest_alone_for_its_head(
    tiny_qwen2_vl: Path, digit_samples: Path, tmp_path: Path, listings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path / "cache", model=tiny_qwen2_vl, data=digit_samples)
    writer = open_teacher_builder(config, read_samples(config.data))
    read: list[str] = []
    read_file = LocalStore.read

    def remember(store: LocalStore, name: str, **options: int) -> bytes:
        read.append(name)
        return read_file(store, name, **options)

    monkeypatch.setattr(LocalStore, "read", remember)
    listings.clear()
    sent = type(writer)(writer.uri, writer.fingerprint, writer.compression, writer.teacher)
    ShardWorker(config, writer=sent, identity={}, log_file=None).close()
    assert (read, listings) == (["CACHE.json"], [])


def test_a_shard_that_is_withdrawn_while_it_is_built_is_not_reported_as_done(
    tiny_qwen2_vl: Path, digit_samples: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path / "cache", model=tiny_qwen2_vl, data=digit_samples)
    config = config.model_copy(update={"samples_per_shard": 28})
    samples = read_samples(config.data)
    worker = ShardWorker(config, writer=open_teacher_builder(config, samples), identity={}, log_file=None)
    writer = worker.writer
    list(worker.build("shard-000000", samples.samples))
    record = tmp_path / "cache" / record_name("shard-000000", 0)

    late = ShardWorker(config, writer=open_teacher_builder(config, samples), identity={}, log_file=None)
    kept = record.read_bytes()
    record.unlink()  # a record that is lost is withdrawn in the revision behind it
    late.writer.start_shard("shard-000000")
    record.write_bytes(kept)
    withdraw_shards(writer.uri, ["shard-000000"])
    record.unlink()
    with pytest.raises(CacheError, match=r"shard shard-000000: withdrawn \(asked for\) while it was built"):
        list(late.build("shard-000000", samples.samples))

    again = ShardWorker(config, writer=open_teacher_builder(config, samples), identity={}, log_file=None)
    *_, report = again.build("shard-000000", samples.samples)
    assert isinstance(report, ShardReport)
    assert report.samples == 28
    assert writer.missing_shards() == []
