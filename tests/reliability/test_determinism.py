"""R25: the same build gives the same bytes, by one worker or by two."""

import uuid
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from blake3 import blake3

from teacher_cache import shard_attempt
from teacher_cache.claims import Claims
from teacher_cache.manifest import read_manifest
from teacher_cache.plan import PlannedShard, read_plan
from teacher_cache.standing import read_standing
from teacher_cache.storage import open_store
from teacher_cache.verify import snapshot_digest, verify_cache
from teacher_cache.writer import CacheWriter
from tests.reliability.processes import quick_folder, run_together
from tests.teacher_cache.store import commit, make_samples, open_builder

SAMPLES = make_samples(12)
WAIT_S = 60
KINDS: dict[str, dict[str, Any]] = {"raw": {}, "zstd": {"compression": "zstd"}, "fp8": {"codec": "fp8"}}
Commit = Callable[[CacheWriter, PlannedShard], object]


def work(root: Path, options: dict[str, Any], commit_one: Commit, first_shard: Any) -> None:
    """Build the shards that no other worker has claimed, until all are committed; each worker builds one at least."""
    writer = open_builder(root, SAMPLES, per_shard=2, **options)
    is_sharing = False
    with Claims(open_store(str(root)), lease_s=60) as claims:
        while missing := writer.missing_shards():
            for shard in missing:
                if claims.take(shard.shard_id):
                    if not is_sharing:
                        first_shard.wait(WAIT_S)
                        is_sharing = True
                    commit_one(writer, shard)
    writer.complete()


def build_by(workers: int, root: Path, options: dict[str, Any], commit_one: Commit) -> None:
    first_shard = get_context("fork").Barrier(workers)
    run_together([partial(work, root, options, commit_one, first_shard)] * workers, on_failure=first_shard.abort)
    assert verify_cache(str(root)).problems == ()


def commit_as_it_comes(writer: CacheWriter, shard: PlannedShard) -> None:
    commit(writer, shard, SAMPLES)


def commit_with_nonce_of_shard(writer: CacheWriter, shard: PlannedShard) -> None:
    nonce = uuid.UUID(bytes=blake3(shard.shard_id.encode()).digest(16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_attempt, "uuid", SimpleNamespace(uuid4=lambda: nonce))
        commit(writer, shard, SAMPLES)


def files_of(root: Path) -> dict[str, Any]:
    """Return the digests of the files of each shard."""
    store = open_store(str(root))
    manifest = read_manifest(store)
    standing = read_standing(store, read_plan(store, manifest), fingerprint=manifest.fingerprint)
    return {shard_id: record.files for shard_id, (record, _) in standing.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_one_worker_and_two_write_the_same_bytes(kind: str) -> None:
    with quick_folder() as folder:
        roots = {"one": folder / "one", "again": folder / "again", "two": folder / "two"}
        for name, root in roots.items():
            build_by(2 if name == "two" else 1, root, KINDS[kind], commit_as_it_comes)
        expected = files_of(roots["one"])
        assert files_of(roots["again"]) == expected
        assert files_of(roots["two"]) == expected
        attempts = {path.name for root in roots.values() for path in (root / "shards").iterdir()}
        assert len(attempts) == len(roots) * len(expected), "the folders of attempts must differ"
        seeded = [folder / "seeded-one", folder / "seeded-two"]
        for workers, root in enumerate(seeded, start=1):
            build_by(workers, root, KINDS[kind], commit_with_nonce_of_shard)
        digests = {snapshot_digest(str(root)) for root in seeded}
        assert files_of(seeded[1]) == expected
    assert len(digests) == 1, "snapshots differ by more than the nonces of attempts"
    files = sum(map(len, expected.values()))
    print(f"R25: {kind}: {files} files of {len(expected)} shards, byte-identical by 1 worker, again, and by 2 workers")
