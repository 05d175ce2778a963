"""Removes what no reader will ever ask for. Decides by records alone, never by a clock.

Only attempts at shards that are committed are removed: such an attempt has lost for good, however alive it is.
Attempts at other shards may still win, so they stay until their shard is committed.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from teacher_cache.claims import CLAIMS, claim_shard_id
from teacher_cache.codec import stored_fields
from teacher_cache.durable_files import FileDigest
from teacher_cache.errors import CacheError, CacheMismatch
from teacher_cache.ledger import SHARDS, CommitRecord, read_standing
from teacher_cache.local_store import STAGING
from teacher_cache.manifest import Manifest, read_manifest
from teacher_cache.plan import Plan, read_plan
from teacher_cache.snapshot import INDEX, latest_snapshot, publish_snapshot, read_snapshot
from teacher_cache.storage import Store, open_store

logger = logging.getLogger(__name__)

LEFTOVERS = re.compile(r"(plans/000000-|teacher_head-)[0-9a-f]{16}\.(json|safetensors)|staging/.*")
"""What a killed creation may leave in a folder that has no manifest yet."""

ATTEMPT = re.compile(r"(?P<shard_id>[A-Za-z0-9_-]+)-(?P<attempt>[0-9a-f]{32})")


@dataclass(frozen=True, kw_only=True)
class GcReport:
    """What was removed."""

    uri: str
    removed: tuple[str, ...]
    """Files and folders, relative to the cache."""
    removed_bytes: int
    pending: tuple[str, ...]
    """Attempts at shards that are not committed: a builder may be at work on them."""


def collect_garbage(uri: str, *, drop_question_rows: bool = False) -> GcReport:
    """Remove lost attempts, temporary files and indexes that no snapshot names; on request tier Q.

    Safe while builders and readers are at work; a reader that is reading tier Q meets an error when it goes.

    Raises:
        CacheMismatch: tier Q is to go from a cache that is not complete.
        CacheCorrupt: what decides is damaged; nothing was removed.
    """
    store = open_store(uri)
    manifest = read_manifest(store)
    plan = read_plan(store, manifest)
    removed: list[str] = []
    if drop_question_rows:
        removed += _drop_question_rows(store, manifest=manifest, plan=plan)
    records = [record for record, _ in read_standing(store, plan, fingerprint=manifest.fingerprint).values()]
    removed += _lost_attempts(store, records) + _scratch(store, records) + _unnamed_indexes(store, manifest)
    freed = _remove_all(store, removed)
    kept = {record.folder for record in records}
    pending = [f"{SHARDS}/{name}" for name in store.folders(SHARDS) if f"{SHARDS}/{name}" not in kept]
    return GcReport(uri=uri, removed=tuple(removed), removed_bytes=freed, pending=tuple(pending))


def sweep(store: Store, *, records: Iterable[CommitRecord]) -> None:
    """Remove the attempts that these committed shards have left behind, and their claims."""
    chosen = list(records)
    for name in _lost_attempts(store, chosen) + _scratch(store, chosen):
        store.remove(name)


def _lost_attempts(store: Store, records: Iterable[CommitRecord]) -> list[str]:
    standing = {record.shard_id: record.attempt for record in records if record.withdrawn is None}
    lost = []
    for name in store.folders(SHARDS):
        match = ATTEMPT.fullmatch(name)
        if match and standing.get(match["shard_id"], match["attempt"]) != match["attempt"]:
            lost.append(f"{SHARDS}/{name}")
    return lost


def _scratch(store: Store, records: Iterable[CommitRecord]) -> list[str]:
    committed = {record.shard_id for record in records if record.withdrawn is None}
    claims = [entry.name for entry in store.list(CLAIMS) if claim_shard_id(entry.name) in committed]
    return claims + [entry.name for entry in store.list(STAGING)]


def _unnamed_indexes(store: Store, manifest: Manifest) -> list[str]:
    latest = latest_snapshot(store)
    if latest is None:
        return []  # a builder that completes the cache writes the index first
    named = {read_snapshot(store, number, fingerprint=manifest.fingerprint).index for number in range(latest + 1)}
    return [entry.name for entry in store.list(INDEX) if entry.name not in named]


def _drop_question_rows(store: Store, *, manifest: Manifest, plan: Plan) -> list[str]:
    standing = read_standing(store, plan, fingerprint=manifest.fingerprint)
    if len(standing) < len(plan.shards) or any(record.withdrawn is not None for record, _ in standing.values()):
        raise CacheMismatch(f"{store.uri} is not complete: finish the build before tier Q is dropped")
    dropped = []
    for record, _ in standing.values():
        without = _without_question_rows(record)
        if without is not None and not store.create(without.name, without.encode()):
            raise CacheError(f"{store.uri}/{without.name} was written by another process; run the command again")
        if without is not None:
            dropped += [f"{record.folder}/{path}" for path in record.files if path not in without.files]
    renewed: list[tuple[CommitRecord, FileDigest]] = list(
        read_standing(store, plan, fingerprint=manifest.fingerprint).values()
    )
    publish_snapshot(store, manifest=manifest, plan=plan, records=renewed)
    return dropped


def _without_question_rows(record: CommitRecord) -> CommitRecord | None:
    if record.layout is None or "Q" not in record.tiers:
        return None
    fields = stored_fields(record.layout)
    kept = {
        path: digest
        for path, digest in record.files.items()
        if (name := path.split("/")[0]) not in fields or fields[name].tier != "Q"
    }
    tiers = tuple(tier for tier in record.tiers if tier != "Q")
    return replace(record, revision=record.revision + 1, tiers=tiers, files=kept)


def _remove_all(store: Store, names: list[str]) -> int:
    freed = 0
    for name in names:
        is_folder = ATTEMPT.fullmatch(name.removeprefix(f"{SHARDS}/"))
        freed += sum(entry.size_bytes for entry in store.list(name)) if is_folder else store.size(name) or 0
        store.remove(name)
    return freed
