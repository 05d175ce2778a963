"""Verification of a cache, quick or of every byte."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count

from teacher_cache.claims import CLAIMS
from teacher_cache.durable_files import digest_bytes
from teacher_cache.errors import CacheCorrupt, CacheError, CacheIncomplete
from teacher_cache.gc import ATTEMPT
from teacher_cache.ledger import COMMITS, SHARDS, record_name
from teacher_cache.local_store import STAGING
from teacher_cache.manifest import MANIFEST, Manifest, read_manifest
from teacher_cache.plan import Plan, PlannedShard, generation_name, read_plan
from teacher_cache.progress import progress
from teacher_cache.sample_index import ShardEntry
from teacher_cache.shard_checks import Check, Kind, Level, Problem, check_file, check_shard, is_unreadable
from teacher_cache.snapshot import (
    SNAPSHOTS,
    Snapshot,
    latest_snapshot,
    lost_generation,
    map_index,
    read_snapshot,
    read_snapshot_bytes,
    snapshot_name,
)
from teacher_cache.standing import highest_revisions, standing_revisions, unplanned_records
from teacher_cache.storage import Store, open_store

_THREADS = 4
_SNAPSHOT = re.compile(rf"{SNAPSHOTS}/([0-9]{{8}})\.json")


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
    unpublished: bool
    """All shards are committed, but the latest snapshot is of an older state: the next build writes one of this."""

    @property
    def ok(self) -> bool:
        """Whether everything that was committed is intact."""
        return not self.problems


def verify_cache(uri: str, *, level: Level = "full", trusted_digest: str | None = None) -> VerifyReport:
    """Check what is stored against what was committed.

    In a complete cache a file that no digest covers is a problem too. Until then such files belong to attempts that
    may still run. Others may write meanwhile: what they add is not looked at, and a shard that they change is checked
    once more.

    Args:
        uri: Where the cache lies.
        level: How much is read, see ``LEVELS``.
        trusted_digest: BLAKE3 of the latest snapshot, kept elsewhere: with it, a cache whose digests were all
            computed anew after a change is refused as well.

    Raises:
        CacheNotFound: there is no cache.
        CacheCorrupt: the manifest or the plan was changed, so that nothing more can be said.
        CacheError: the store cannot be listed.
    """
    try:
        return _verify(uri, level=level, trusted_digest=trusted_digest)
    except OSError as error:
        if isinstance(error, CacheError):
            raise
        raise CacheError(f"{uri} cannot be verified: {error}; mend the store, then verify again") from error


def snapshot_digest(uri: str) -> str:
    """Return the BLAKE3 (hex) of the latest snapshot, which covers every byte of the cache.

    Raises:
        CacheIncomplete: there is no snapshot yet.
    """
    store = open_store(uri)
    number = latest_snapshot(store)
    if number is None:
        raise CacheIncomplete(f"{uri} has no snapshot; complete the build")
    return digest_bytes(read_snapshot_bytes(store, number)).blake3


def _verify(uri: str, *, level: Level, trusted_digest: str | None) -> VerifyReport:
    store = open_store(uri)
    manifest = read_manifest(store)
    # before what names them is read: whatever comes later belongs to work that goes on
    listed = [entry.name for entry in store.list("")]
    plan = read_plan(store, manifest)
    snapshots, problems = _check_snapshots(store, manifest)
    latest = snapshots[-1] if snapshots else None
    standing, entries = standing_revisions(store), index_entries(store, latest)
    if trusted_digest is not None:
        problems += _check_trusted(store, latest, trusted_digest=trusted_digest)
        problems += _check_beyond(latest, manifest=manifest, plan=plan, standing=standing, entries=entries)
    problems += _check_plan(store, latest, manifest=manifest, plan=plan, standing=standing)
    top = _check_top_level(store, manifest=manifest, plan=plan, snapshots=snapshots, level=level)
    problems += _check_indexes(snapshots, top=top)
    shards = _check_shards(store, manifest=manifest, plan=plan, standing=standing, entries=entries, level=level)
    checks = [top, *shards]
    problems += [problem for check in checks for problem in check.problems]
    missing = tuple(shard.shard_id for shard, check in zip(plan.shards, shards, strict=True) if check.missing)
    known = {snapshot_name(snapshot.number) for snapshot in snapshots} | {snapshot.index for snapshot in snapshots}
    known.update(*(check.known for check in checks))
    if latest is not None:
        undecided = [shard.shard_id for shard, check in zip(plan.shards, shards, strict=True) if not check.names_files]
        unknown = set(_extra_names(listed, known=known, undecided=undecided))
        problems += _extra_files(store, manifest, unknown) if unknown else ()
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
        unpublished=bool(entries) and not missing and _is_newer(standing, plan=plan, entries=entries),
    )


def named_files(store: Store, manifest: Manifest) -> set[str]:
    """Return the parts of the plan, the records of planned shards, and the snapshots with their indexes."""
    plan = read_plan(store, manifest)
    planned = {shard.shard_id for shard in plan.shards}
    named = {generation_name(number, manifest) for number in range(len(plan.generations))}
    named |= {entry.name for entry in store.list(COMMITS) if planned & highest_revisions([entry.name]).keys()}
    for snapshot in _check_snapshots(store, manifest)[0]:
        named |= {snapshot_name(snapshot.number), snapshot.index}
    return named


def index_entries(store: Store, latest: Snapshot | None) -> dict[str, ShardEntry]:
    """Return what the index of a snapshot holds of each shard; nothing where it is damaged, as its digest tells."""
    try:
        return {} if latest is None else {entry.shard_id: entry for entry in map_index(store, latest).shards}
    except CacheCorrupt:
        return {}


def _check_trusted(store: Store, latest: Snapshot | None, *, trusted_digest: str) -> Iterator[Problem]:
    found = None if latest is None else snapshot_digest(store.uri)
    if found != trusted_digest:
        name = snapshot_name(0 if latest is None else latest.number)
        message = f"{store.uri}/{name}: the latest snapshot has blake3 {found}, {trusted_digest} is trusted"
        yield Problem(kind="untrusted", path=name, message=message)


def _check_beyond(
    latest: Snapshot | None,
    *,
    manifest: Manifest,
    plan: Plan,
    standing: Mapping[str, int],
    entries: Mapping[str, ShardEntry],
) -> Iterator[Problem]:
    """Yield the parts of the plan and the records that no snapshot vouches for."""
    generations = [generation_name(number, manifest) for number in range(len(plan.generations))]
    beyond = [name for name in generations if latest is None or name not in latest.files]
    beyond += [
        record_name(shard_id, revision)
        for shard_id, revision in standing.items()
        if shard_id not in entries or revision > entries[shard_id].revision
    ]
    for name in beyond:
        message = f"{name}: it came after the trusted snapshot, which says nothing of it"
        yield Problem(kind="untrusted", path=name, message=message)


def _check_plan(
    store: Store, latest: Snapshot | None, *, manifest: Manifest, plan: Plan, standing: Mapping[str, int]
) -> Iterator[Problem]:
    """Yield a generation that records, but no snapshot, show to be lost."""
    name = generation_name(len(plan.generations), manifest)
    unplanned = unplanned_records(store, plan, manifest=manifest, revisions=standing)
    if unplanned and (latest is None or name not in latest.files):
        message = lost_generation(store, plan, manifest=manifest, records=unplanned)
        yield Problem(kind="missing", path=name, message=message)


def _check_snapshots(store: Store, manifest: Manifest) -> tuple[list[Snapshot], list[Problem]]:
    snapshots, problems = [], []
    numbers = {int(match[1]) for entry in store.list(SNAPSHOTS) if (match := _SNAPSHOT.fullmatch(entry.name))}
    first_gap = next(number for number in count() if number not in numbers)
    for number in sorted({*numbers, min(first_gap, max(numbers))} if numbers else ()):
        try:
            snapshots.append(read_snapshot(store, number, fingerprint=manifest.fingerprint))
        except CacheError as error:
            kind: Kind = "changed" if number in numbers else "missing"
            kind = "unreadable" if is_unreadable(error) else kind
            problems.append(Problem(kind=kind, path=snapshot_name(number), message=str(error)))
    return snapshots, problems


def _check_indexes(snapshots: Sequence[Snapshot], *, top: Check) -> Iterator[Problem]:
    """Yield the snapshots whose samples cannot be found any more."""
    lost = {problem.path for problem in top.problems if problem.kind != "unreadable"}
    for snapshot in snapshots:
        if snapshot.index in lost:
            message = f"snapshot {snapshot.number}: its index {snapshot.index} is lost"
            yield Problem(kind="changed", path=snapshot_name(snapshot.number), message=message)


def _check_top_level(
    store: Store, *, manifest: Manifest, plan: Plan, snapshots: Sequence[Snapshot], level: Level
) -> Check:
    files = {snapshot.index: snapshot.files[snapshot.index] for snapshot in snapshots}
    files |= snapshots[-1].files if snapshots else {}
    if manifest.teacher_head is not None:
        files[manifest.teacher_head.file] = manifest.teacher_head.digest
    names = {MANIFEST, *(generation_name(number, manifest) for number in range(len(plan.generations)))}
    problems = [
        problem
        for name, expected in files.items()
        for problem in check_file(store, name, expected=expected, shard_id=None, level=level)
    ]
    return Check(known=frozenset(names | files.keys()), problems=tuple(problems))


def _is_newer(standing: Mapping[str, int], *, plan: Plan, entries: Mapping[str, ShardEntry]) -> bool:
    """Tell whether shards were committed after the snapshot whose entries these are."""
    return any(
        shard.shard_id not in entries or standing.get(shard.shard_id, 0) > entries[shard.shard_id].revision
        for shard in plan.shards
    )


def _check_shards(
    store: Store,
    *,
    manifest: Manifest,
    plan: Plan,
    standing: Mapping[str, int],
    entries: Mapping[str, ShardEntry],
    level: Level,
) -> list[Check]:
    def check(shard: PlannedShard, standing: Mapping[str, int] = standing) -> Check:
        revision = standing.get(shard.shard_id)
        found = check_shard(
            store,
            shard,
            revision=revision,
            entry=entries.get(shard.shard_id),
            fingerprint=manifest.fingerprint,
            level=level,
        )
        return replace(found, problems=tuple(replace(problem, revision=revision) for problem in found.problems))

    with (
        ThreadPoolExecutor(_THREADS) as pool,
        progress(total=len(plan.shards), unit="shard", description=f"cache verify, {level}") as bar,
    ):
        checks = []
        for done in pool.map(check, plan.shards):
            checks.append(done)
            bar.update(1)
    while True:
        now = standing_revisions(store)
        moved = [
            place
            for place, (shard, found) in enumerate(zip(plan.shards, checks, strict=True))
            if any(problem.revision != now.get(shard.shard_id) for problem in found.problems)
        ]
        if not moved:
            return checks
        for place in moved:
            checks[place] = check(plan.shards[place], now)


def _extra_names(names: Iterable[str], *, known: set[str], undecided: Iterable[str]) -> Iterator[str]:
    are_undecided = frozenset(undecided)
    for name in names:
        top, _, rest = name.partition("/")
        attempt = ATTEMPT.fullmatch(rest.partition("/")[0])
        is_undecided = top == SHARDS and attempt is not None and attempt["shard_id"] in are_undecided
        is_transient = top in (STAGING, CLAIMS) and rest
        if name not in known and not is_transient and not is_undecided:
            yield name


def _extra_files(store: Store, manifest: Manifest, unknown: set[str]) -> Iterator[Problem]:
    """Yield those of the unknown files that nobody has named or tidied away since they were listed."""
    unknown = unknown - named_files(store, manifest)
    for entry in store.list(""):
        if entry.name in unknown:
            message = f"{entry.name}: no digest covers this file; remove it, or run `genrecal cache gc`"
            yield Problem(kind="extra", path=entry.name, message=message)
