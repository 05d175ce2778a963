"""Which commit records of a cache stand."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from teacher_cache.durable_files import FileDigest, digest_bytes
from teacher_cache.errors import CacheCorrupt, CacheError
from teacher_cache.ledger import COMMITS, LAST_REVISION, CommitRecord, decode_record, record_name
from teacher_cache.manifest import Manifest, read_document
from teacher_cache.plan import Plan, PlannedShard, read_plan
from teacher_cache.storage import DOCUMENT_LIMIT_BYTES, Store

_PARALLEL_READS: Final = 16
_RECORD_BYTES, _SAMPLE_BYTES = 4 * 1024**2, 64 * 1024
"""What a record may take at most, and more per sample."""


def record_limit_bytes(shard: PlannedShard) -> int:
    """Return how long the commit record of a shard may be."""
    return min(_RECORD_BYTES + len(shard.sample_ids) * _SAMPLE_BYTES, DOCUMENT_LIMIT_BYTES)


def standing_revisions(store: Store) -> dict[str, int]:
    """Return the highest revision of each shard that has commit records.

    Raises:
        CacheError: the records cannot be listed.
    """
    try:
        return highest_revisions(entry.name for entry in store.list(COMMITS))
    except OSError as error:
        raise CacheError(f"cannot list {store.uri}/{COMMITS}: {error}") from error


def highest_revisions(names: Iterable[str]) -> dict[str, int]:
    """Return the highest revision of each shard among the names of commit records; other names do not matter."""
    found: dict[str, int] = {}
    for name in names:
        shard_id, _, revision = name.removeprefix(f"{COMMITS}/").removesuffix(".json").rpartition(".")
        number = int(revision) if revision.isdecimal() else -1
        if 0 <= number <= LAST_REVISION and name == record_name(shard_id, number):
            found[shard_id] = max(number, found.get(shard_id, 0))
    return found


def unplanned_records(store: Store, plan: Plan, *, manifest: Manifest, revisions: Mapping[str, int]) -> list[str]:
    """Return the records of this cache whose shards no plan names: they prove that a generation of the plan is lost.

    Args:
        store: The files of the cache.
        plan: Read before the revisions were listed.
        manifest: Of the cache.
        revisions: The standing revision of each shard.
    """
    planned = {shard.shard_id for shard in plan.shards}
    names = [record_name(shard_id, number) for shard_id, number in revisions.items() if shard_id not in planned]
    found = [name for name in names if _is_record_of(store, name, fingerprint=manifest.fingerprint)]
    # another builder may have extended the cache in between
    return found if found and read_plan(store, manifest).generations == plan.generations else []


def read_standing(
    store: Store, plan: Plan, *, fingerprint: str, revisions: Mapping[str, int] | None = None
) -> dict[str, tuple[CommitRecord, FileDigest]]:
    """Return the standing record of each planned shard that has one, withdrawn ones too, in planned order.

    Args:
        store: The files of the cache.
        plan: Whose shards are looked for.
        fingerprint: Of the manifest.
        revisions: The standing revision of each shard, listed now when not given.

    Raises:
        CacheCorrupt: a record differs from what was written, or belongs to another cache or plan.
    """
    revisions = standing_revisions(store) if revisions is None else revisions
    shards = [shard for shard in plan.shards if shard.shard_id in revisions]
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        records = pool.map(
            lambda shard: read_record(store, shard, revision=revisions[shard.shard_id], fingerprint=fingerprint), shards
        )
        return {shard.shard_id: record for shard, record in zip(shards, records, strict=True)}


def read_record(
    store: Store, shard: PlannedShard, *, revision: int, fingerprint: str
) -> tuple[CommitRecord, FileDigest]:
    """Read and check one commit record; return it with the digest of its bytes.

    Raises:
        CacheCorrupt: it differs from what was written, or belongs to another cache or plan.
    """
    name = record_name(shard.shard_id, revision)
    data = read_document(store, name, where=f"shard {shard.shard_id}", limit_bytes=record_limit_bytes(shard))
    where = f"shard {shard.shard_id}: {store.uri}/{name}"
    record = decode_record(data, where=where)
    if (record.shard_id, record.revision, record.fingerprint) != (shard.shard_id, revision, fingerprint):
        raise CacheCorrupt(
            f"{where} belongs to shard {record.shard_id}, revision {record.revision}, of cache "
            f"{record.fingerprint[:16]}; expected shard {shard.shard_id}, revision {revision}, of {fingerprint[:16]}"
        )
    found = [*record.sample_ids, *(sample.sample_id for sample in record.skipped)]
    if record.withdrawn is None and sorted(found) != sorted(shard.sample_ids):
        raise CacheCorrupt(f"{where} does not hold the planned samples of the shard")
    return record, digest_bytes(data)


def _is_record_of(store: Store, name: str, *, fingerprint: str) -> bool:
    try:
        data = read_document(store, name, where=name, limit_bytes=DOCUMENT_LIMIT_BYTES)
        return decode_record(data, where=name).fingerprint == fingerprint
    except (CacheError, OSError):
        return False
