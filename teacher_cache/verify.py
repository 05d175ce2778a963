"""Verification of a cache, quick or of every byte."""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from teacher_cache.claims import CLAIMS
from teacher_cache.codec import AXES, stored_fields
from teacher_cache.durable_files import FileDigest, digest_bytes
from teacher_cache.errors import CacheCorrupt, CacheError, CacheIncomplete
from teacher_cache.gc import ATTEMPT
from teacher_cache.ledger import SHARDS, CommitRecord, read_record, record_name, standing_revisions
from teacher_cache.local_store import STAGING
from teacher_cache.manifest import MANIFEST, Manifest, read_document, read_manifest
from teacher_cache.plan import Plan, PlannedShard, generation_name, read_plan
from teacher_cache.reader import map_index, require_digest
from teacher_cache.sample_index import ShardEntry
from teacher_cache.shard_reader import RowRange, ShardReader
from teacher_cache.shard_writer import OFFSETS, offsets_field
from teacher_cache.snapshot import SNAPSHOTS, Snapshot, latest_snapshot, read_snapshot, snapshot_name
from teacher_cache.storage import Store, open_store
from teacher_cache.zarr_format import ArrayGeometry, object_name

Level = Literal["full", "rows", "quick"]
LEVELS: dict[Level, str] = {
    "full": "the digest of every file",
    "rows": "the checksum of every sample's rows",
    "quick": "names and lengths of all files, and the documents",
}
Kind = Literal["missing", "changed", "extra", "unreadable"]

_THREADS = 4
_SNAPSHOT = re.compile(rf"{SNAPSHOTS}/([0-9]{{8}})\.json")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One way in which stored bytes are not what was committed."""

    kind: Kind
    path: str
    """Relative to the cache."""
    message: str
    shard_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What a verification found."""

    uri: str
    fingerprint: str
    level: Level
    files: int
    samples: int
    """Samples of shards without a problem."""
    problems: tuple[Problem, ...]
    missing_shards: tuple[str, ...]
    """Planned and not committed: no damage, the build goes on there."""

    @property
    def ok(self) -> bool:
        """Whether everything that was committed is intact."""
        return not self.problems


@dataclass(frozen=True, kw_only=True)
class _Check:
    """What the check of one part has found."""

    known: frozenset[str] = frozenset()
    """Files that a digest covers."""
    problems: tuple[Problem, ...] = ()
    samples: int = 0
    missing: bool = False


def verify_cache(uri: str, *, level: Level = "full", trusted_digest: str | None = None) -> VerifyReport:
    """Check what is stored against what was committed.

    In a complete cache a file that no digest covers is a problem too. Until then such files belong to attempts that
    may still run.

    Args:
        uri: Where the cache lies.
        level: How much is read, see ``LEVELS``.
        trusted_digest: BLAKE3 of the latest snapshot, kept elsewhere: with it, a cache whose digests were all
            computed anew after a change is refused as well.

    Raises:
        CacheNotFound: there is no cache.
        CacheCorrupt: the manifest or the plan was changed, so that nothing more can be said.
    """
    store = open_store(uri)
    manifest = read_manifest(store)
    plan = read_plan(store, manifest)
    snapshots, problems = _check_snapshots(store, manifest)
    latest = snapshots[-1] if snapshots else None
    if trusted_digest is not None:
        problems += _check_trusted(store, latest, trusted_digest=trusted_digest)
    top = _check_top_level(store, manifest=manifest, plan=plan, latest=latest, level=level)
    shards = _check_shards(store, manifest=manifest, plan=plan, latest=latest, level=level)
    checks = [top, *shards]
    problems += [problem for check in checks for problem in check.problems]
    missing = tuple(shard.shard_id for shard, check in zip(plan.shards, shards, strict=True) if check.missing)
    known = {snapshot_name(snapshot.number) for snapshot in snapshots} | {snapshot.index for snapshot in snapshots}
    known.update(*(check.known for check in checks))
    if latest is not None:
        problems += _extra_files(store, known=known, missing=missing)
    elif not missing:
        message = "all shards are committed and there is no snapshot; run the build again to write it"
        problems.append(Problem(kind="missing", path=snapshot_name(0), message=message))
    return VerifyReport(
        uri=uri,
        fingerprint=manifest.fingerprint,
        level=level,
        files=len(known),
        samples=sum(check.samples for check in checks),
        problems=tuple(problems),
        missing_shards=missing,
    )


def snapshot_digest(uri: str) -> str:
    """Return the BLAKE3 (hex) of the latest snapshot, which covers every byte of the cache.

    Raises:
        CacheIncomplete: there is no snapshot yet.
    """
    store = open_store(uri)
    number = latest_snapshot(store)
    if number is None:
        raise CacheIncomplete(f"{uri} has no snapshot; complete the build")
    return digest_bytes(read_document(store, snapshot_name(number), where=f"snapshot {number}")).blake3


def _check_trusted(store: Store, latest: Snapshot | None, *, trusted_digest: str) -> Iterator[Problem]:
    found = None if latest is None else snapshot_digest(store.uri)
    if found != trusted_digest:
        name = snapshot_name(0 if latest is None else latest.number)
        message = f"{store.uri}/{name}: the latest snapshot has blake3 {found}, {trusted_digest} is trusted"
        yield Problem(kind="changed", path=name, message=message)


def _check_snapshots(store: Store, manifest: Manifest) -> tuple[list[Snapshot], list[Problem]]:
    snapshots, problems = [], []
    numbers = {int(match[1]) for entry in store.list(SNAPSHOTS) if (match := _SNAPSHOT.fullmatch(entry.name))}
    for number in range(max(numbers, default=-1) + 1):
        try:
            snapshots.append(read_snapshot(store, number, fingerprint=manifest.fingerprint))
        except CacheError as error:
            kind: Kind = "changed" if number in numbers else "missing"
            problems.append(Problem(kind=kind, path=snapshot_name(number), message=str(error)))
    return snapshots, problems


def _check_top_level(store: Store, *, manifest: Manifest, plan: Plan, latest: Snapshot | None, level: Level) -> _Check:
    files = {} if latest is None else dict(latest.files)
    if manifest.teacher_head is not None:
        files[manifest.teacher_head.file] = manifest.teacher_head.digest
    names = {MANIFEST, *(generation_name(number, manifest) for number in range(len(plan.generations)))}
    problems = [
        problem
        for name, expected in files.items()
        for problem in _check_file(store, name, expected=expected, shard_id=None, level=level)
    ]
    return _Check(known=frozenset(names | files.keys()), problems=tuple(problems))


def _check_shards(
    store: Store, *, manifest: Manifest, plan: Plan, latest: Snapshot | None, level: Level
) -> list[_Check]:
    standing = standing_revisions(store)
    try:
        index = None if latest is None else map_index(store, latest)
        entries = {} if index is None else {entry.shard_id: entry for entry in index.shards}
    except CacheError:
        entries = {}  # the digest of the index says so

    def check(shard: PlannedShard) -> _Check:
        return _check_shard(
            store,
            shard,
            revision=standing.get(shard.shard_id),
            entry=entries.get(shard.shard_id),
            fingerprint=manifest.fingerprint,
            level=level,
        )

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(check, plan.shards))


def _check_shard(
    store: Store, shard: PlannedShard, *, revision: int | None, entry: ShardEntry | None, fingerprint: str, level: Level
) -> _Check:
    shard_id = shard.shard_id
    if revision is None or (entry is not None and revision < entry.revision):
        if entry is None:
            return _Check(missing=True)
        message = f"shard {shard_id}: its commit record {entry.record_name} is missing from a completed cache"
        return _Check(problems=(Problem(kind="missing", path=entry.record_name, message=message, shard_id=shard_id),))
    known = {record_name(shard_id, number) for number in range(revision + 1)}
    problems: list[Problem] = []
    record = None
    for number in range(revision + 1):
        name = record_name(shard_id, number)
        try:
            if number < revision and store.size(name) is None:
                continue  # superseded, and taken away by a repair
            record, digest = read_record(store, shard, revision=number, fingerprint=fingerprint)
            if entry is not None and number == entry.revision and digest != entry.record:
                raise CacheCorrupt(f"shard {shard_id}: {name} was changed after the cache was completed")
        except (CacheError, OSError) as error:
            record = None
            problems.append(Problem(kind="changed", path=name, message=str(error), shard_id=shard_id))
    if record is None or record.withdrawn is not None:
        return _Check(known=frozenset(known), problems=tuple(problems), missing=record is not None)
    known |= {f"{record.folder}/{path}" for path in record.files}
    damage = [*_check_files(store, record, level=level)]
    if not damage and level == "rows":
        damage += _check_rows(store, record)
    samples = 0 if damage else len(record.sample_ids)
    return _Check(known=frozenset(known), problems=(*problems, *damage), samples=samples)


def _check_files(store: Store, record: CommitRecord, *, level: Level) -> Iterator[Problem]:
    if (problem := _files_problem(record)) is not None:
        yield Problem(kind="changed", path=record.name, message=problem, shard_id=record.shard_id)
        return
    for path, expected in record.files.items():
        name = f"{record.folder}/{path}"
        yield from _check_file(store, name, expected=expected, shard_id=record.shard_id, level=level)


def _files_problem(record: CommitRecord) -> str | None:
    """Return how the files that a record names differ from those that its samples need, or None."""
    if record.layout is None:
        return None if not record.files else f"shard {record.shard_id}: files without samples"
    expected: dict[str, int | None] = {"zarr.json": None, f"{OFFSETS}/zarr.json": None}
    geometries = {
        name: ArrayGeometry(field=field, num_rows=int(rows[-1]), compression=record.layout.compression)
        for name, field in stored_fields(record.layout).items()
        if field.tier in record.tiers
        for rows in [record.rows.offsets[field.axis]]
    }
    geometries[OFFSETS] = ArrayGeometry(field=offsets_field(), num_rows=len(record.sample_ids) + 1, compression="none")
    for name, geometry in geometries.items():
        expected[f"{name}/zarr.json"] = None
        if geometry.num_rows:
            is_raw = geometry.compression == "none"
            expected[object_name(name, geometry)] = geometry.object_bytes if is_raw else None
    wrong = sorted(expected.keys() ^ record.files.keys())
    wrong += [
        path
        for path, size in expected.items()
        if size is not None and path in record.files and record.files[path].size_bytes != size
    ]
    return None if not wrong else f"shard {record.shard_id}: its commit record misdescribes {', '.join(wrong[:5])}"


def _check_file(
    store: Store, name: str, *, expected: FileDigest, shard_id: str | None, level: Level
) -> Iterator[Problem]:
    where = "cache" if shard_id is None else f"shard {shard_id}"
    try:
        if level == "full" or name.endswith(".json"):
            require_digest(store, name, expected=expected, where=where)
        elif (size := store.size(name)) != expected.size_bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise CacheCorrupt(f"{where}: {store.uri}/{name} {found}, {expected.size_bytes} bytes were committed")
    except (CacheError, OSError) as error:
        yield Problem(kind=_kind(store, name), path=name, message=str(error), shard_id=shard_id)


def _kind(store: Store, name: str) -> Kind:
    try:
        return "missing" if store.size(name) is None else "changed"
    except OSError:
        return "unreadable"


def _check_rows(store: Store, record: CommitRecord) -> Iterator[Problem]:
    if record.layout is None:
        return
    offsets = record.rows.offsets
    reader = ShardReader(
        store,
        record.folder,
        shard_id=record.shard_id,
        layout=record.layout,
        num_rows={axis: int(rows[-1]) for axis, rows in offsets.items()},
        samples=len(record.sample_ids),
    )
    try:
        for column, (name, field) in enumerate(stored_fields(record.layout).items()):
            starts = offsets[field.axis]
            for row, sample_id in enumerate(record.sample_ids if field.tier in record.tiers else ()):
                crc32c = int(record.rows.crc32c[row, column])
                start, stop = int(starts[row]), int(starts[row + 1])
                reader.read(name, RowRange(sample_id=sample_id, start=start, stop=stop, crc32c=crc32c))
        if not np.array_equal(reader.read_offsets(), np.stack([offsets[axis] for axis in AXES], axis=1)):
            raise CacheCorrupt(f"shard {record.shard_id}: the stored offsets differ from its commit record")
    except CacheError as error:
        yield Problem(kind="changed", path=record.folder, message=str(error), shard_id=record.shard_id)


def _extra_files(store: Store, *, known: set[str], missing: Sequence[str]) -> Iterator[Problem]:
    for entry in store.list(""):
        top, _, rest = entry.name.partition("/")
        attempt = ATTEMPT.fullmatch(rest.partition("/")[0])
        in_progress = top == SHARDS and attempt is not None and attempt["shard_id"] in missing
        if entry.name not in known and top not in (STAGING, CLAIMS) and not in_progress:
            message = f"{entry.name}: no digest covers this file; remove it, or run `genrecal cache gc`"
            yield Problem(kind="extra", path=entry.name, message=message)
