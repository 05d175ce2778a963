"""Checks of one shard and of one file against what was committed."""

import errno
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from teacher_cache.codec import AXES, Layout, stored_fields
from teacher_cache.config import Level
from teacher_cache.documents import parse_document
from teacher_cache.durable_files import FileDigest
from teacher_cache.errors import CacheCorrupt, CacheError
from teacher_cache.ledger import CommitRecord, record_name
from teacher_cache.plan import PlannedShard
from teacher_cache.sample_index import ShardEntry
from teacher_cache.shard_reader import RowRange, ShardReader
from teacher_cache.shard_writer import OFFSETS, offsets_field
from teacher_cache.standing import read_record
from teacher_cache.storage import Store, TruncatedFile
from teacher_cache.stored_digest import require_digest
from teacher_cache.zarr_format import ArrayGeometry, array_metadata, group_metadata, object_name

Kind = Literal["missing", "changed", "extra", "untrusted", "unreadable"]
"""``unreadable`` says nothing about what is stored: the store did not give it."""

_NO_FILE_OF_OURS = (errno.EINVAL, errno.ELOOP, errno.EFBIG)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One way in which stored bytes are not what was committed."""

    kind: Kind
    path: str
    """Relative to the cache."""
    message: str
    shard_id: str | None = None
    revision: int | None = None
    """Of the shard's standing record when it was checked; None where it had none."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What the check of one part has found."""

    known: frozenset[str] = frozenset()
    """Files that a digest covers."""
    problems: tuple[Problem, ...] = ()
    samples: int = 0
    missing: bool = False
    names_files: bool = True
    """Whether a record says which files there are."""


def check_shard(
    store: Store, shard: PlannedShard, *, revision: int | None, entry: ShardEntry | None, fingerprint: str, level: Level
) -> Check:
    """Check the records and files of one planned shard; ``entry`` is what the index holds of it."""
    shard_id = shard.shard_id
    if revision is None or (entry is not None and revision < entry.revision):
        if entry is None:
            return Check(missing=True, names_files=False)
        message = f"shard {shard_id}: its commit record {entry.record_name} is missing from a completed cache"
        problem = Problem(kind="missing", path=entry.record_name, message=message, shard_id=shard_id)
        return Check(problems=(problem,), names_files=False)
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
            kind: Kind = "unreadable" if is_unreadable(error) else "changed"
            problems.append(Problem(kind=kind, path=name, message=str(error), shard_id=shard_id))
    if record is None or record.withdrawn is not None:
        missing = record is not None
        return Check(known=frozenset(known), problems=tuple(problems), missing=missing, names_files=False)
    known |= {f"{record.folder}/{path}" for path in record.files}
    damage = [*_check_files(store, record, level=level)]
    if not damage and level != "quick":
        damage += _check_metadata(store, record)
    if not damage and level == "rows":
        damage += _check_rows(store, record)
    samples = 0 if damage else len(record.sample_ids)
    return Check(known=frozenset(known), problems=(*problems, *damage), samples=samples)


def _check_files(store: Store, record: CommitRecord, *, level: Level) -> Iterator[Problem]:
    if (problem := _files_problem(record)) is not None:
        yield Problem(kind="changed", path=record.name, message=problem, shard_id=record.shard_id)
        return
    for path, expected in record.files.items():
        name = f"{record.folder}/{path}"
        yield from check_file(store, name, expected=expected, shard_id=record.shard_id, level=level)


def _files_problem(record: CommitRecord) -> str | None:
    """Return how the files that a record names differ from those that its samples need, or None."""
    if record.layout is None:
        return None if not record.files else f"shard {record.shard_id}: files without samples"
    expected: dict[str, int | None] = {"zarr.json": None}
    for name, geometry in _geometries(record, record.layout).items():
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


def _geometries(record: CommitRecord, layout: Layout) -> dict[str, ArrayGeometry]:
    """Return the sizes of the arrays that a shard holds, by name."""
    geometries = {
        name: ArrayGeometry(field=field, num_rows=int(rows[-1]), compression=layout.compression)
        for name, field in stored_fields(layout).items()
        if field.tier in record.tiers
        for rows in [record.rows.offsets[field.axis]]
    }
    geometries[OFFSETS] = ArrayGeometry(field=offsets_field(), num_rows=len(record.sample_ids) + 1, compression="none")
    return geometries


def _check_metadata(store: Store, record: CommitRecord) -> Iterator[Problem]:
    """Check what other Zarr libraries go by and this one never reads: shapes, types and codecs."""
    expected = {"zarr.json": group_metadata({})}
    if record.layout is not None:
        geometries = _geometries(record, record.layout)
        expected |= {f"{name}/zarr.json": array_metadata(geometries[name], attributes={}) for name in geometries}
    for path, metadata in expected.items() if record.files else ():
        name = f"{record.folder}/{path}"
        try:
            found = parse_document(store.read(name, limit_bytes=record.files[path].size_bytes), where=name)
            if {**found, "attributes": {}} != {**json.loads(metadata), "attributes": {}}:
                raise CacheCorrupt(f"{name} describes another array than its commit record")
        except (CacheError, OSError) as error:
            message = f"shard {record.shard_id}: {error}"
            yield Problem(kind=_kind(store, name, error), path=name, message=message, shard_id=record.shard_id)


def check_file(
    store: Store, name: str, *, expected: FileDigest, shard_id: str | None, level: Level
) -> Iterator[Problem]:
    """Yield what is wrong with one file, by its digest or, on a faster level, by its length."""
    where = "cache" if shard_id is None else f"shard {shard_id}"
    try:
        if level == "full" or name.endswith(".json"):
            require_digest(store, name, expected=expected, where=where)
        elif (size := store.size(name)) != expected.size_bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise CacheCorrupt(f"{where}: {store.uri}/{name} {found}, {expected.size_bytes} bytes were committed")
    except (CacheError, OSError) as error:
        yield Problem(kind=_kind(store, name, error), path=name, message=str(error), shard_id=shard_id)


def is_unreadable(error: CacheError | OSError) -> bool:
    """Tell a store that does not answer from bytes that are gone or wrong: only those are to be computed again."""
    cause = error if isinstance(error, OSError) else error.__cause__
    gone = (FileNotFoundError, NotADirectoryError, TruncatedFile)
    return isinstance(cause, OSError) and not isinstance(cause, gone) and cause.errno not in _NO_FILE_OF_OURS


def _kind(store: Store, name: str, error: CacheError | OSError) -> Kind:
    if is_unreadable(error):
        return "unreadable"
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
        kind: Kind = "unreadable" if is_unreadable(error) else "changed"
        yield Problem(kind=kind, path=record.folder, message=str(error), shard_id=record.shard_id)
