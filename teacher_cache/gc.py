"""Removes what no reader will ever ask for. Decides by records alone, never by a clock.

Only attempts at shards that are committed are removed: such an attempt has lost for good, however alive it is.
Attempts at other shards may still win, so they stay until their shard is committed. What may go is listed before the
records are read: whatever comes later belongs to work that goes on.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from teacher_cache.claims import CLAIMS, claim_shard_id
from teacher_cache.codec import stored_fields
from teacher_cache.errors import CacheError, CacheIncomplete
from teacher_cache.ledger import SHARDS, CommitRecord
from teacher_cache.local_store import STAGING
from teacher_cache.manifest import Manifest, read_manifest
from teacher_cache.plan import PLANS, Plan, read_plan
from teacher_cache.progress import progress
from teacher_cache.snapshot import INDEX, latest_snapshot, publish_snapshot, read_snapshot
from teacher_cache.standing import read_standing
from teacher_cache.storage import FileEntry, Store, open_store

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
    """Remove lost attempts, temporary files and whatever no record or snapshot names; on request tier Q.

    Safe while builders and readers are at work; a reader that is reading tier Q meets an error when it goes.

    Raises:
        CacheIncomplete: tier Q is to go from a cache that is not complete.
        CacheCorrupt: what decides is damaged; nothing was removed.
        CacheError: the store refused a step.
    """
    store = open_store(uri)
    manifest = read_manifest(store)
    plan = read_plan(store, manifest)
    try:
        folders, files = find_leftovers(store), list(store.list(""))
        if drop_question_rows:
            _drop_question_rows(store, manifest=manifest, plan=plan)
        complete = publish_snapshot(store, manifest=manifest)
        if complete is None and drop_question_rows:
            raise CacheIncomplete(f"{uri} is not complete: finish the build before tier Q is dropped")
        records = complete or [
            record for record, _ in read_standing(store, plan, fingerprint=manifest.fingerprint).values()
        ]
        removed = _superfluous([*folders, *(entry.name for entry in files)], manifest=manifest, records=records)
        if complete is not None:
            removed += _unnamed_files(files, records=records) + _unnamed_indexes(store, files, manifest=manifest)
        with progress(total=len(removed), unit="item", description="cache gc") as bar:
            for name in removed:
                store.remove(name)
                bar.update(1)
        kept = {record.folder for record in records}
        pending = tuple(name for name in _attempts(store) if name not in kept)
    except OSError as error:
        if isinstance(error, CacheError):
            raise
        raise CacheError(f"{uri}: cannot remove what is left over: {error}; run the command again") from error
    gone = set(removed)
    freed = sum(entry.size_bytes for entry in files if gone & {entry.name, *_folders_of(entry.name)})
    return GcReport(uri=uri, removed=tuple(removed), removed_bytes=freed, pending=pending)


def find_leftovers(store: Store) -> list[str]:
    """Return what may have been left behind, for :func:`sweep`."""
    files = [entry.name for folder in (CLAIMS, STAGING, PLANS) for entry in store.list(folder)]
    return _attempts(store) + files


def sweep(store: Store, *, found: Sequence[str], manifest: Manifest, records: Sequence[CommitRecord]) -> None:
    """Remove those of the names found that these committed shards do not need."""
    for name in _superfluous(found, manifest=manifest, records=records):
        store.remove(name)


def _attempts(store: Store) -> list[str]:
    return [f"{SHARDS}/{name}" for name in store.folders(SHARDS) if ATTEMPT.fullmatch(name)]


def _superfluous(names: Iterable[str], *, manifest: Manifest, records: Sequence[CommitRecord]) -> list[str]:
    committed = {record.shard_id: record.folder for record in records if record.withdrawn is None}
    named = {manifest.plan.file, *([] if manifest.teacher_head is None else [manifest.teacher_head.file])}

    def is_superfluous(name: str) -> bool:
        folder, _, rest = name.partition("/")
        if folder == SHARDS:
            attempt = ATTEMPT.fullmatch(rest)
            return attempt is not None and committed.get(attempt["shard_id"], name) != name
        if folder == CLAIMS:
            return claim_shard_id(name) in committed
        return name not in named and LEFTOVERS.fullmatch(name) is not None

    return [name for name in dict.fromkeys(names) if is_superfluous(name)]


def _unnamed_files(files: Iterable[FileEntry], *, records: Sequence[CommitRecord]) -> list[str]:
    """Return files in the folders of committed shards that no record names, and folders that hold nothing else."""
    named = {f"{record.folder}/{path}" for record in records for path in record.files}
    used = {folder for name in named for folder in _folders_of(name) if folder != SHARDS}
    unnamed: dict[str, None] = {}
    for name in (entry.name for entry in files if entry.name not in named):
        nearest, above, *_ = [*_folders_of(name), "", ""]
        if nearest in used:
            unnamed[name] = None
        elif above in used:
            unnamed[nearest] = None
    return list(unnamed)


def _unnamed_indexes(store: Store, files: Iterable[FileEntry], *, manifest: Manifest) -> list[str]:
    count = (latest_snapshot(store) or 0) + 1
    named = {read_snapshot(store, number, fingerprint=manifest.fingerprint).index for number in range(count)}
    return [entry.name for entry in files if entry.name.startswith(f"{INDEX}/") and entry.name not in named]


def _folders_of(name: str) -> list[str]:
    """Return the folders above a file, the nearest first."""
    return [str(folder) for folder in PurePosixPath(name).parents][:-1]


def _drop_question_rows(store: Store, *, manifest: Manifest, plan: Plan) -> None:
    """Commit revisions without tier Q; its files are then named by no record."""
    standing = read_standing(store, plan, fingerprint=manifest.fingerprint)
    if len(standing) < len(plan.shards) or any(record.withdrawn is not None for record, _ in standing.values()):
        raise CacheIncomplete(f"{store.uri} is not complete: finish the build before tier Q is dropped")
    for record, _ in standing.values():
        without = _without_question_rows(record)
        if without is not None and not store.create(without.name, without.encode()):
            raise CacheError(f"{store.uri}/{without.name} was written by another process; run the command again")


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
