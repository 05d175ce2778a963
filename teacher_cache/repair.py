"""Repair: gives up what is damaged, so that the next build computes it again and nothing else."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from teacher_cache.errors import CacheCorrupt, CacheError
from teacher_cache.ledger import COMMITS, SHARDS, CommitRecord, no_rows, record_name
from teacher_cache.manifest import MANIFEST, Manifest, read_manifest
from teacher_cache.plan import PLANS, PlannedShard, read_plan
from teacher_cache.shard_checks import Problem
from teacher_cache.snapshot import INDEX, SNAPSHOTS, fill_gaps, latest_snapshot, read_snapshot
from teacher_cache.standing import highest_revisions, read_record, standing_revisions
from teacher_cache.storage import Store, open_store
from teacher_cache.verify import index_entries, named_files, verify_cache
from teacher_cache.writer import CacheWriter


@dataclass(frozen=True, kw_only=True)
class RepairReport:
    """What a repair did."""

    uri: str
    withdrawn_shards: tuple[str, ...]
    """To be computed again by the next build."""
    removed: tuple[str, ...]
    """Damaged or unknown files that are written again, or were never part of the cache."""
    rewritten: bool
    """A snapshot was written from the commit records."""
    beyond_repair: tuple[Problem, ...]
    """What neither a build nor this command can restore."""


def repair_cache(uri: str) -> RepairReport:
    """Verify every byte, withdraw the shards that are damaged, and write damaged snapshots again.

    Raises:
        CacheNotFound: there is no cache.
        CacheCorrupt: the manifest or the plan was changed: no shard can be told from it any more.
        CacheError: the store refused a step, or does not give a file: what it holds may be intact.
    """
    store = open_store(uri)
    manifest = read_manifest(store)
    problems = verify_cache(uri).problems
    _require_readable(problems, uri=uri)
    try:
        return _repair(store, manifest, problems, uri=uri)
    except OSError as error:
        if isinstance(error, CacheError):
            raise
        raise CacheError(
            f"{uri} cannot be repaired: {error}; free space or mend the store, then repair again"
        ) from error


def withdraw_shards(uri: str, shard_ids: Sequence[str]) -> RepairReport:
    """Withdraw these shards, intact or not, so that the next build computes them again; nothing is verified.

    Raises:
        CacheNotFound: there is no cache.
        CacheCorrupt: the manifest, the plan or the latest snapshot was changed.
        CacheError: the cache has no such shard, or the store refused a step.
    """
    store = open_store(uri)
    manifest = read_manifest(store)
    planned = {shard.shard_id: shard for shard in read_plan(store, manifest).shards}
    if unknown := [shard_id for shard_id in shard_ids if shard_id not in planned]:
        raise CacheError(f"{uri} has no shard {', '.join(unknown)}; `genrecal cache inspect` names its shards")
    number = latest_snapshot(store)
    latest = None if number is None else read_snapshot(store, number, fingerprint=manifest.fingerprint)
    standing, entries = standing_revisions(store), index_entries(store, latest)
    withdrawn = []
    for shard_id in dict.fromkeys(shard_ids):
        revision = standing.get(shard_id)
        if revision is None or _is_withdrawn(store, planned[shard_id], manifest, revision=revision):
            continue
        if shard_id in entries:
            revision = max(revision, entries[shard_id].revision)
        _withdraw(store, manifest, shard_id, revision=revision + 1, reason="asked for")
        withdrawn.append(shard_id)
    return RepairReport(uri=uri, withdrawn_shards=tuple(withdrawn), removed=(), rewritten=False, beyond_repair=())


def _is_withdrawn(store: Store, shard: PlannedShard, manifest: Manifest, *, revision: int) -> bool:
    try:
        record, _ = read_record(store, shard, revision=revision, fingerprint=manifest.fingerprint)
    except CacheCorrupt:
        return False
    return record.withdrawn is not None


def _require_readable(problems: Sequence[Problem], *, uri: str) -> None:
    unreadable = [problem for problem in problems if problem.kind == "unreadable"]
    if unreadable:
        raise CacheError(
            f"{len(unreadable)} file(s) of {uri} cannot be read, so nothing was repaired: {unreadable[0].message}; "
            "mend the store, or remove the files that it has lost, then repair again"
        )


def _repair(store: Store, manifest: Manifest, problems: Sequence[Problem], *, uri: str) -> RepairReport:
    names = [entry.name for entry in store.list(COMMITS)]
    standing = highest_revisions(names)
    # others may have written since: what they made of a shard was not checked
    problems = [one for one in problems if one.shard_id is None or standing.get(one.shard_id) == one.revision]
    damaged = list(dict.fromkeys(problem.shard_id for problem in problems if problem.shard_id is not None))
    # a record that is gone had a revision too: whoever saw it must not take another one for it
    revisions = highest_revisions(names + [problem.path for problem in problems])
    for shard_id in damaged:
        _withdraw(store, manifest, shard_id, revision=revisions.get(shard_id, -1) + 1, reason="damaged")
    fixed = (MANIFEST, "" if manifest.teacher_head is None else manifest.teacher_head.file)
    beyond = [
        problem
        for problem in problems
        if problem.kind != "extra" and (problem.path in fixed or problem.path.startswith(f"{PLANS}/"))
    ]
    # without its generation of the plan, an intact record looks like a file that was never part of the cache
    lost_plan = any(problem.path.startswith(f"{PLANS}/") for problem in beyond)
    snapshots = [
        problem.path for problem in problems if problem.path.startswith(f"{SNAPSHOTS}/") and problem.kind != "extra"
    ]
    indexes = [problem for problem in problems if problem.path.startswith(f"{INDEX}/")]
    named = named_files(store, manifest)
    removed = [
        problem.path
        for problem in problems
        if problem not in beyond
        and problem.kind != "missing"
        and not (problem.kind == "extra" and (lost_plan or problem in indexes or problem.path in named))
        and not problem.path.startswith(f"{SHARDS}/")
    ]
    for name in removed:
        store.remove(name)
    if snapshots:
        fill_gaps(store, manifest=manifest)
    rewritten = False
    if (snapshots or indexes) and not damaged and not lost_plan:
        latest = latest_snapshot(store)
        if CacheWriter(uri=uri, fingerprint=manifest.fingerprint).complete():
            lost = snapshots or any(problem.kind != "extra" for problem in indexes)
            rewritten = bool(lost) or latest_snapshot(store) != latest
            # an index comes before its snapshot; now that this state has one, no other index will be named
            named = named_files(store, manifest)
            stray = [one.path for one in indexes if one.kind == "extra" and one.path not in named]
            for name in stray:
                store.remove(name)
            removed += stray
    return RepairReport(
        uri=uri,
        withdrawn_shards=tuple(damaged),
        removed=tuple(removed),
        rewritten=rewritten,
        beyond_repair=tuple(beyond),
    )


def _withdraw(store: Store, manifest: Manifest, shard_id: str, *, revision: int, reason: str) -> None:
    """Commit a revision that takes the shard back."""
    record = CommitRecord(
        shard_id=shard_id,
        revision=revision,
        attempt=uuid.uuid4().hex,
        fingerprint=manifest.fingerprint,
        withdrawn=reason,
        sample_ids=(),
        rows=no_rows(),
        skipped=(),
        layout=None,
        files={},
        provenance={},
    )
    try:
        if not store.create(record_name(shard_id, revision), record.encode()):
            raise CacheError(f"shard {shard_id}: another process changed it during the repair; run the repair again")
    except OSError as error:
        raise CacheError(f"shard {shard_id}: cannot withdraw it in {store.uri}: {error}") from error
