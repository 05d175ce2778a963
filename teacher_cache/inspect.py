"""Status and full verification of a cache."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from teacher_cache.codec import AXES
from teacher_cache.errors import CacheCorrupt, CacheError
from teacher_cache.ledger import CommitRecord, committed_shards, read_record, record_path
from teacher_cache.manifest import Manifest, Plan, PlannedShard, read_manifest, read_plan
from teacher_cache.reader import tier_bytes
from teacher_cache.seal import ATTEMPT, Seal, read_seal
from teacher_cache.shard import ShardReader
from teacher_cache.storage import MANIFEST, SEAL, STAGING, FileDigest, local_root, require_digest


@dataclass(frozen=True, kw_only=True)
class CacheStatus:
    """How far a cache is."""

    uri: str
    fingerprint: str
    planned_shards: int
    committed_shards: int
    planned_samples: int
    stored_samples: int
    skipped_samples: int
    missing_shards: tuple[str, ...]
    sealed: bool
    tier_bytes: dict[str, int]

    @property
    def complete(self) -> bool:
        """Whether every planned shard is committed."""
        return not self.missing_shards


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One way in which stored bytes are not what was committed."""

    kind: Literal["missing", "changed", "extra", "unreadable"]
    path: str
    """Relative to the cache."""
    message: str
    shard_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What a full verification found."""

    uri: str
    fingerprint: str
    files: int
    samples: int
    """Samples whose every row was read and matched its checksum."""
    problems: tuple[Problem, ...]
    missing_shards: tuple[str, ...]
    """Planned and not committed: no damage, the build goes on there."""

    @property
    def ok(self) -> bool:
        """Whether everything that was committed is intact."""
        return not self.problems


def cache_status(uri: str) -> CacheStatus:
    """Return how far a cache is, from its commit records.

    Raises:
        CacheNotFound: there is no cache.
        CacheCorrupt: the manifest, the plan or a commit record was changed.
    """
    root = local_root(uri)
    manifest = read_manifest(root)
    plan = read_plan(root, manifest)
    committed = committed_shards(root, plan)
    records = [read_record(root, shard, fingerprint=manifest.fingerprint) for shard in committed]
    return CacheStatus(
        uri=uri,
        fingerprint=manifest.fingerprint,
        planned_shards=len(plan.shards),
        committed_shards=len(committed),
        planned_samples=plan.num_samples,
        stored_samples=sum(len(record.samples.sample_id) for record in records),
        skipped_samples=sum(len(record.skipped) for record in records),
        missing_shards=_missing(plan, committed),
        sealed=read_seal(root, manifest) is not None,
        tier_bytes=tier_bytes(records),
    )


def verify_cache(uri: str) -> VerifyReport:
    """Check every committed file against its digest and read every sample.

    In a completed cache a file that no digest covers is a problem too, but for what attempts left in
    ``staging``. Until then such files belong to attempts that may still run.

    Raises:
        CacheNotFound: there is no cache.
        CacheCorrupt: the manifest, the plan or the seal was changed, so that nothing more can be said.
    """
    root = local_root(uri)
    manifest = read_manifest(root)
    plan = read_plan(root, manifest)
    seal = read_seal(root, manifest)
    committed = committed_shards(root, plan)
    problems = list(_check_top_level(root, manifest=manifest, plan=plan, committed=committed, seal=seal))
    known = {MANIFEST, SEAL, manifest.plan.file}
    if manifest.teacher_head is not None:
        known.add(manifest.teacher_head.file)
    num_samples = 0
    for shard in committed:
        path = record_path(root, shard.shard_id).relative_to(root).as_posix()
        known.add(path)
        try:
            record = read_record(root, shard, fingerprint=manifest.fingerprint, sealed=_sealed_digest(seal, path))
        except CacheError as error:
            problems.append(Problem(kind="changed", path=path, message=str(error), shard_id=shard.shard_id))
            continue
        folder = record.folder(root).relative_to(root)
        known |= {f"{folder}/{name}" for name in record.files}
        damage = list(_check_files(root, record)) or list(_check_samples(root, record))
        problems += damage
        num_samples += 0 if damage else len(record.samples.sample_id)
    if seal is not None:
        problems += _extra_files(root, known=known)
    return VerifyReport(
        uri=uri,
        fingerprint=manifest.fingerprint,
        files=len(known),
        samples=num_samples,
        problems=tuple(problems),
        missing_shards=_missing(plan, committed),
    )


def _missing(plan: Plan, committed: list[PlannedShard]) -> tuple[str, ...]:
    done = {shard.shard_id for shard in committed}
    return tuple(shard.shard_id for shard in plan.shards if shard.shard_id not in done)


def _sealed_digest(seal: Seal | None, path: str) -> FileDigest | None:
    return None if seal is None else seal.files.get(path)


def _check_top_level(
    root: Path, *, manifest: Manifest, plan: Plan, committed: list[PlannedShard], seal: Seal | None
) -> Iterator[Problem]:
    if manifest.teacher_head is not None:
        yield from _check_file(root, manifest.teacher_head.file, expected=manifest.teacher_head.digest, shard_id=None)
    missing = _missing(plan, committed)
    if seal is not None:
        for shard_id in missing:
            path = record_path(root, shard_id).relative_to(root).as_posix()
            message = f"shard {shard_id}: its commit record {path} is missing from a completed cache"
            yield Problem(kind="missing", path=path, message=message, shard_id=shard_id)
    elif not missing:
        message = f"{SEAL} is missing although all shards are committed; run the build again to write it"
        yield Problem(kind="missing", path=SEAL, message=message)


def _check_files(root: Path, record: CommitRecord) -> Iterator[Problem]:
    folder = record.folder(root).relative_to(root)
    for name, expected in record.files.items():
        yield from _check_file(root, f"{folder}/{name}", expected=expected, shard_id=record.shard_id)


def _check_file(root: Path, path: str, *, expected: FileDigest, shard_id: str | None) -> Iterator[Problem]:
    where = "teacher head" if shard_id is None else f"shard {shard_id}"
    try:
        require_digest(root / path, expected=expected, where=where)
    except CacheError as error:
        kind: Literal["missing", "changed"] = "changed" if os.path.lexists(root / path) else "missing"
        yield Problem(kind=kind, path=path, message=str(error), shard_id=shard_id)
    except OSError as error:
        yield Problem(kind="unreadable", path=path, message=f"{where}: {error}", shard_id=shard_id)


def _check_samples(root: Path, record: CommitRecord) -> Iterator[Problem]:
    if record.layout is None:
        return
    folder = record.folder(root)
    try:
        reader = ShardReader(folder, record)
        for _ in reader.read(range(len(record.samples.sample_id))):
            pass
        stored = reader.read_offsets()
        expected = np.stack([record.samples.offsets()[axis] for axis in AXES], axis=1)
        if not np.array_equal(stored, expected):
            raise CacheCorrupt(f"shard {record.shard_id}: the stored offsets differ from its commit record")
    except CacheError as error:
        path = folder.relative_to(root).as_posix()
        yield Problem(kind="unreadable", path=path, message=str(error), shard_id=record.shard_id)


def _extra_files(root: Path, *, known: set[str]) -> Iterator[Problem]:
    for parent, _, names in os.walk(root):
        for name in sorted(names):
            path = Path(parent, name).relative_to(root)
            is_scratch = path.parts[0] == STAGING and len(path.parts) > 1 and ATTEMPT.fullmatch(path.parts[1])
            if path.as_posix() not in known and not is_scratch:
                message = f"{path}: no digest covers this file; remove it"
                yield Problem(kind="extra", path=path.as_posix(), message=message)
