"""Status of a cache, and what two caches have in common."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teacher_cache.errors import CacheError, CacheNotFound, FormatUnsupported
from teacher_cache.manifest import MANIFEST, Manifest, identity_differences, read_manifest
from teacher_cache.plan import Plan, read_plan
from teacher_cache.sample_index import SampleIndex, tier_bytes
from teacher_cache.schema import TIERS
from teacher_cache.snapshot import is_published, latest_snapshot, map_index, read_snapshot
from teacher_cache.standing import read_standing, standing_revisions
from teacher_cache.storage import Store, open_store

_NAMED = 20


@dataclass(frozen=True, kw_only=True)
class CacheStatus:
    """How far a cache is."""

    uri: str
    fingerprint: str
    """Of the identity, data not included."""
    planned_shards: int
    committed_shards: int
    planned_samples: int
    stored_samples: int
    skipped_samples: int
    missing_shards: tuple[str, ...]
    withdrawn_shards: tuple[str, ...]
    """Missing because a repair gave them up."""
    snapshot: int | None
    """Number of the latest complete state."""
    published: bool
    """The latest snapshot is of what is committed now; until it is, readers see an older state or none."""
    tier_bytes: dict[str, int]

    @property
    def complete(self) -> bool:
        """Whether every planned shard is committed."""
        return not self.missing_shards


@dataclass(frozen=True, kw_only=True)
class CacheDifference:
    """What two caches, or a cache and a run, do not have in common."""

    identity: tuple[str, ...]
    """One line per field that differs."""
    only_left: tuple[str, ...]
    """Samples, or the first of them."""
    only_right: tuple[str, ...]
    changed: tuple[str, ...]
    """Samples of the same id with another content."""
    samples_left: int
    samples_right: int
    samples_both: int

    @property
    def same(self) -> bool:
        """Whether both hold the same targets for the same samples."""
        return not (self.identity or self.only_left or self.only_right or self.changed)


@dataclass(frozen=True, kw_only=True)
class FoundCache:
    """A cache under a folder, and how it serves a run."""

    uri: str
    serves: bool
    """It holds, or will hold once complete, every sample that the run asks for, with the same identity."""
    complete: bool
    samples: int
    missing_samples: int
    """Samples of the run that it does not hold."""
    changed_samples: int
    """Samples of the run that it holds with another text or other images."""
    tier_bytes: dict[str, int]
    differences: tuple[str, ...]


def cache_status(uri: str) -> CacheStatus:
    """Return how far a cache is, from its commit records.

    Raises:
        CacheNotFound: there is no cache.
        CacheCorrupt: the manifest, the plan or a commit record was changed.
    """
    store = open_store(uri)
    manifest = read_manifest(store)
    plan = read_plan(store, manifest)
    standing = read_standing(store, plan, fingerprint=manifest.fingerprint)
    committed = [record for record, _ in standing.values() if record.withdrawn is None]
    done = {record.shard_id for record in committed}
    sizes = [tier_bytes(record) for record in committed]
    complete = len(committed) == len(plan.shards)
    return CacheStatus(
        uri=uri,
        fingerprint=manifest.fingerprint,
        planned_shards=len(plan.shards),
        committed_shards=len(committed),
        planned_samples=plan.num_samples,
        stored_samples=sum(len(record.sample_ids) for record in committed),
        skipped_samples=sum(len(record.skipped) for record in committed),
        missing_shards=tuple(shard.shard_id for shard in plan.shards if shard.shard_id not in done),
        withdrawn_shards=tuple(shard_id for shard_id in standing if shard_id not in done),
        snapshot=latest_snapshot(store),
        published=complete and is_published(store, manifest=manifest, plan=plan, standing=list(standing.values())),
        tier_bytes={tier: sum(size[tier] for size in sizes) for tier in TIERS},
    )


def compare_caches(left: str, right: str) -> CacheDifference:
    """Return what two caches do not have in common: identity and planned samples.

    Raises:
        CacheError: one of them cannot be read.
    """
    sides = []
    for uri in (left, right):
        store = open_store(uri)
        manifest = read_manifest(store)
        sides.append((manifest.identity, read_plan(store, manifest).digests()))
    (left_identity, left_samples), (right_identity, right_samples) = sides
    both = left_samples.keys() & right_samples.keys()
    return CacheDifference(
        identity=tuple(identity_differences(stored=left_identity, asked=right_identity, sides=("left", "right"))),
        only_left=tuple(sorted(left_samples.keys() - both)[:_NAMED]),
        only_right=tuple(sorted(right_samples.keys() - both)[:_NAMED]),
        changed=tuple(sorted(id_ for id_ in both if left_samples[id_] != right_samples[id_])[:_NAMED]),
        samples_left=len(left_samples),
        samples_right=len(right_samples),
        samples_both=len(both),
    )


def find_caches(folder: Path, *, identity: dict[str, Any], digests: dict[str, str]) -> list[FoundCache]:
    """Return the caches directly in a folder, or in folders below, those that serve a run first.

    Args:
        folder: Local folder that holds caches.
        identity: What the run asks for, the data not included.
        digests: SHA-256 of each sample of the run by id.
    """
    found = []
    for uri in _cache_folders(folder):
        try:
            found.append(_serves(uri, identity=identity, digests=digests))
        except (CacheNotFound, FormatUnsupported, CacheError) as error:
            found.append(_unusable(uri, str(error)))
    return sorted(found, key=lambda cache: (not cache.serves, len(cache.differences), not cache.complete, cache.uri))


def _cache_folders(folder: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        if MANIFEST in files:
            folders.clear()  # there are no caches within a cache, but very many folders
            yield parent


def _published_index(store: Store, *, manifest: Manifest, plan: Plan) -> SampleIndex | None:
    """Return the index of the latest snapshot if it is of what is committed now; reads no commit record."""
    latest = latest_snapshot(store)
    if latest is None:
        return None
    index = map_index(store, read_snapshot(store, latest, fingerprint=manifest.fingerprint))
    standing = standing_revisions(store)
    committed = {shard.shard_id: standing.get(shard.shard_id) for shard in plan.shards}
    return index if {entry.shard_id: entry.revision for entry in index.shards} == committed else None


def _serves(uri: str, *, identity: dict[str, Any], digests: dict[str, str]) -> FoundCache:
    store = open_store(uri)
    manifest = read_manifest(store)
    plan = read_plan(store, manifest)
    differences = identity_differences(stored=manifest.identity, asked=identity)
    planned = plan.digests()
    changed = sum(planned.get(sample_id, digest) != digest for sample_id, digest in digests.items())
    missing = sum(sample_id not in planned for sample_id in digests)
    index = _published_index(store, manifest=manifest, plan=plan)
    return FoundCache(
        uri=uri,
        serves=not (differences or missing or changed),
        complete=index is not None,
        samples=len(planned),
        missing_samples=missing,
        changed_samples=changed,
        tier_bytes=cache_status(uri).tier_bytes if index is None else index.tier_bytes(),
        differences=tuple(differences),
    )


def _unusable(uri: str, reason: str) -> FoundCache:
    return FoundCache(
        uri=uri,
        serves=False,
        complete=False,
        samples=0,
        missing_samples=0,
        changed_samples=0,
        tier_bytes={},
        differences=(reason,),
    )
