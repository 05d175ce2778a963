"""Snapshots: numbered, immutable states of a complete cache, each with one index over all its samples.

A reader opens the highest snapshot, or the one it is given; neither lists a folder. An extension, a repair or the
removal of a tier makes the next one.
"""

import logging
import re
from collections.abc import Sequence
from typing import Final

from pydantic import JsonValue

from teacher_cache.checked_file import checked_file
from teacher_cache.documents import encode_document
from teacher_cache.durable_files import FileDigest, digest_bytes
from teacher_cache.errors import CacheCorrupt, CacheError
from teacher_cache.ledger import COMMITS, CommitRecord
from teacher_cache.manifest import LIMIT_BYTES, MANIFEST, Manifest, StoredModel, parse_model, read_document
from teacher_cache.plan import PLANS, Plan, generation_name, read_plan
from teacher_cache.sample_index import SampleIndex
from teacher_cache.standing import read_standing, standing_revisions, unplanned_records
from teacher_cache.storage import Store

logger = logging.getLogger(__name__)

SNAPSHOTS: Final = "snapshots"
INDEX: Final = "index"
_NAME = re.compile(rf"{SNAPSHOTS}/([0-9]{{8}})\.json")


class Snapshot(StoredModel):
    """Content of snapshots/<number>.json."""

    number: int
    fingerprint: str
    """Of the manifest."""
    data: dict[str, JsonValue]
    """What identifies the samples, those that were skipped included."""
    index: str
    """Name of the index."""
    files: dict[str, FileDigest]
    """Manifest, plan, teacher head and index; the index names the commit records."""


def snapshot_name(number: int) -> str:
    """Return where a snapshot lies."""
    return f"{SNAPSHOTS}/{number:08}.json"


def index_name(index: bytes) -> str:
    """Return where an index of these bytes lies."""
    return f"{INDEX}/{digest_bytes(index).blake3[:16]}.safetensors"


def latest_snapshot(store: Store) -> int | None:
    """Return the highest number of a snapshot, or None; numbers have no gaps, so few requests are enough.

    Raises:
        CacheError: the store does not answer.
    """
    try:
        step = 1
        while store.size(snapshot_name(step - 1)) is not None:
            step *= 2
        low, high = step // 2 - 1, step - 1  # ``low`` exists (or is -1), ``high`` does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if store.size(snapshot_name(middle)) is not None else (low, middle)
    except OSError as error:
        raise CacheError(f"cannot look for snapshots in {store.uri}: {error}") from error
    return low if low >= 0 else None


def read_snapshot_bytes(store: Store, number: int) -> bytes:
    """Return the bytes of a snapshot.

    Raises:
        CacheCorrupt: it is missing.
        CacheError: it cannot be read.
    """
    return read_document(store, snapshot_name(number), where=f"snapshot {number}", limit_bytes=LIMIT_BYTES)


def read_snapshot(store: Store, number: int, *, fingerprint: str) -> Snapshot:
    """Read and check a snapshot.

    Raises:
        CacheCorrupt: it is missing, was changed, or belongs to another cache.
    """
    where = f"{store.uri}/{snapshot_name(number)}"
    snapshot = parse_model(Snapshot, read_snapshot_bytes(store, number), where=where)
    if (snapshot.number, snapshot.fingerprint) != (number, fingerprint):
        raise CacheCorrupt(
            f"{where} is snapshot {snapshot.number} of cache {snapshot.fingerprint[:16]}, "
            f"expected {number} of {fingerprint[:16]}"
        )
    if snapshot.index not in snapshot.files:
        raise CacheCorrupt(f"{where} gives no digest of its index {snapshot.index!r}")
    return snapshot


def map_index(store: Store, snapshot: Snapshot) -> SampleIndex:
    """Return the index of a snapshot, after checking its digest.

    Raises:
        CacheCorrupt: it is missing or was changed.
        CacheError: it cannot be read.
    """
    expected = snapshot.files[snapshot.index]
    with checked_file(store, snapshot.index, expected=expected, where="index of samples") as path:
        return SampleIndex.map_file(path, where=f"{store.uri}/{snapshot.index}")


def publish_snapshot(store: Store, *, manifest: Manifest) -> list[CommitRecord] | None:
    """Make a snapshot of the cache as it is now, unless the latest one is of the same state.

    Returns the records of that state; None while a planned shard is not committed. Any number of processes may do
    this at once. The state is read after the number of the latest snapshot: who changes the state publishes it
    afterwards, so whoever holds an older one finds its number taken, and looks again.

    Raises:
        CacheCorrupt: a part of the plan, or what a record or a snapshot says, was lost or changed.
        CacheError: the store refused a step; opening the builder again tries once more.
    """
    try:
        while True:
            latest = latest_snapshot(store)
            plan = read_plan(store, manifest)
            revisions = standing_revisions(store)
            if unplanned := unplanned_records(store, plan, manifest=manifest, revisions=revisions):
                raise CacheCorrupt(lost_generation(store, plan, manifest=manifest, records=unplanned))
            records = read_standing(store, plan, fingerprint=manifest.fingerprint, revisions=revisions)
            standing = list(records.values())
            if len(standing) < len(plan.shards) or any(record.withdrawn is not None for record, _ in standing):
                return None
            # the names may be those of a process that died before they were durable
            for folder in (PLANS, COMMITS, SNAPSHOTS):
                store.sync(folder)
            if _publish(store, manifest=manifest, plan=plan, standing=standing, latest=latest):
                return [record for record, _ in standing]
    except OSError as error:
        if isinstance(error, CacheError):
            raise
        raise CacheError(
            f"{store.uri}: all shards are committed, but the snapshot cannot be written: {error}; free space or mend "
            "the store, then run the build again"
        ) from error


def lost_generation(store: Store, plan: Plan, *, manifest: Manifest, records: Sequence[str]) -> str:
    """Return the message for a generation of the plan that is lost, as these records show."""
    return (
        f"{store.uri}/{generation_name(len(plan.generations), manifest)} is missing: no plan names the shards of "
        f"{len(records)} record(s), first {records[0]}; restore it, or extend the cache by the same samples again"
    )


def fill_gaps(store: Store, *, manifest: Manifest) -> None:
    """Give the numbers of lost snapshots the highest one's state: numbers have no gaps, and nobody reads the lost ones.

    Raises:
        CacheError: the store refused a step.
    """
    names = {entry.name for entry in store.list(SNAPSHOTS)}
    numbers = [int(match[1]) for name in names if (match := _NAME.fullmatch(name))]
    if not numbers:
        return
    highest = read_snapshot(store, max(numbers), fingerprint=manifest.fingerprint)
    for number in range(highest.number):
        if snapshot_name(number) not in names:
            state = highest.model_copy(update={"number": number})
            store.create(snapshot_name(number), encode_document(state.model_dump(mode="json")))


def is_published(
    store: Store, *, manifest: Manifest, plan: Plan, standing: list[tuple[CommitRecord, FileDigest]]
) -> bool:
    """Tell whether the latest snapshot is of the state that these records make.

    Raises:
        CacheCorrupt: the latest snapshot was changed.
    """
    latest = latest_snapshot(store)
    if latest is None:
        return False
    index = index_name(SampleIndex.from_records(standing, digests=plan.digests()).encode())
    return read_snapshot(store, latest, fingerprint=manifest.fingerprint).index == index


def _publish(
    store: Store,
    *,
    manifest: Manifest,
    plan: Plan,
    standing: list[tuple[CommitRecord, FileDigest]],
    latest: int | None,
) -> bool:
    """Return whether readers find this state, in the snapshot after ``latest`` or in ``latest`` itself."""
    index = SampleIndex.from_records(standing, digests=plan.digests()).encode()
    name = index_name(index)
    files = {MANIFEST: digest_bytes(manifest.encode()), name: digest_bytes(index)}
    files |= {generation_name(number, manifest): digest for number, digest in enumerate(plan.generations)}
    if manifest.teacher_head is not None:
        files[manifest.teacher_head.file] = manifest.teacher_head.digest
    previous = None if latest is None else read_snapshot(store, latest, fingerprint=manifest.fingerprint)
    if previous is not None:
        _require_plans(store, previous, files=files)
    is_current = previous is not None and previous.files == files
    if is_current and store.size(name) == len(index):
        store.sync(INDEX)
    elif not store.create_content(name, index):
        store.remove(name)  # its name says what it must hold: it was damaged
        if not store.create_content(name, index):
            raise CacheCorrupt(f"{store.uri}/{name} holds other bytes than its name says; remove it")
    if is_current:
        return True
    number = 0 if latest is None else latest + 1
    snapshot = Snapshot(
        number=number,
        fingerprint=manifest.fingerprint,
        data=plan.data,
        index=name,
        files=dict(sorted(files.items())),
    )
    if not store.create(snapshot_name(number), encode_document(snapshot.model_dump(mode="json"))):
        return False
    samples = plan.data["samples"]
    logger.info("%s is complete: snapshot %d of %d shards, %s samples", store.uri, number, len(plan.shards), samples)
    # where a snapshot was lost, this one may have taken its number, and older ones follow
    return latest_snapshot(store) == number


def _require_plans(store: Store, previous: Snapshot, *, files: dict[str, FileDigest]) -> None:
    """Refuse a state that lacks samples of the one before because a generation of the plan was lost."""
    for name, digest in previous.files.items():
        if name.startswith(f"{PLANS}/") and files.get(name) != digest:
            raise CacheCorrupt(
                f"{store.uri}/{name} is missing, or not the one that {snapshot_name(previous.number)} was made with; "
                "restore it, or extend the cache by the same samples again"
            )
