"""All stored samples of a cache as columns: found by id, mapped into memory rather than read, bounded in size."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8, UInt32, UInt64
from pydantic import Field, TypeAdapter, ValidationError, model_validator
from safetensors import safe_open
from safetensors.numpy import save

from teacher_cache.codec import Layout, stored_fields
from teacher_cache.durable_files import FileDigest
from teacher_cache.errors import CacheCorrupt
from teacher_cache.ledger import (
    COUNTS,
    SHARDS,
    Attempt,
    CommitRecord,
    Revision,
    SampleRows,
    StoredTiers,
    join_rows,
    record_name,
)
from teacher_cache.manifest import StoredModel
from teacher_cache.plan import SHARD_ID
from teacher_cache.schema import TIERS, SkippedSample, Tier

_SHARD_TABLES = 256
_MOST_ROWS = 2**40


class ShardEntry(StoredModel):
    """What reading a shard needs, beside the rows of its samples."""

    shard_id: str = Field(pattern=rf"^{SHARD_ID.pattern}$")
    revision: Revision
    attempt: Attempt
    record: FileDigest
    layout: Layout | None
    tiers: StoredTiers
    samples: int = Field(ge=0, le=_MOST_ROWS)
    turns: int = Field(ge=0, le=_MOST_ROWS)
    tier_bytes: dict[Tier, int]
    """Stored bytes of the arrays of each tier."""
    skipped: tuple[SkippedSample, ...]

    @model_validator(mode="after")
    def _require_layout_iff_samples(self) -> "ShardEntry":
        if bool(self.samples) != (self.layout is not None):
            raise ValueError("samples and layout must be given together")
        return self

    @property
    def folder(self) -> str:
        """Name of the shard's folder."""
        return f"{SHARDS}/{self.shard_id}-{self.attempt}"

    @property
    def record_name(self) -> str:
        """Name of the commit record."""
        return record_name(self.shard_id, self.revision)


_ENTRIES = TypeAdapter(tuple[ShardEntry, ...])


@dataclass(frozen=True, kw_only=True)
class _Columns:
    id_bytes: UInt8[np.ndarray, " bytes"]
    id_offsets: Int64[np.ndarray, " samples+1"]
    digests: UInt8[np.ndarray, "samples 32"]
    counts: np.ndarray
    spans: np.ndarray
    crc32c: np.ndarray
    keys: UInt64[np.ndarray, " samples"]
    """Hashes of the ids, ascending."""
    key_order: UInt32[np.ndarray, " samples"]
    """Position of the sample that each key belongs to."""
    shards: UInt8[np.ndarray, " bytes"]
    """The shards' entries as JSON."""


_FORMS: dict[str, tuple[str, tuple[int, ...]]] = {
    "id_bytes": ("u1", ()),
    "id_offsets": ("<i8", ()),
    "digests": ("u1", (32,)),
    "counts": ("<i4", (len(COUNTS),)),
    "spans": ("<i4", (2,)),
    "keys": ("<u8", ()),
    "key_order": ("<u4", ()),
}
"""Element type of each column and the shape of its rows."""


class SampleIndex:
    """Finds samples by id and gives the rows of any shard."""

    def __init__(self, columns: _Columns, *, where: str) -> None:
        """Take columns that were read or made.

        Raises:
            CacheCorrupt: their lengths do not fit each other.
        """
        self._columns = columns
        self._where = where
        try:
            self.shards = _ENTRIES.validate_json(columns.shards.tobytes())
        except ValidationError as error:
            raise CacheCorrupt(f"{where}: its list of shards is damaged: {error.errors()[0]['msg']}") from error
        self.first_sample = np.concatenate([[0], np.cumsum([shard.samples for shard in self.shards], dtype=np.int64)])
        first_turn = np.concatenate([[0], np.cumsum([shard.turns for shard in self.shards], dtype=np.int64)])
        lengths = {len(columns.id_offsets) - 1, *(len(column) for column in self._per_sample())}
        if lengths != {int(self.first_sample[-1])} or len(columns.spans) != int(first_turn[-1]):
            raise CacheCorrupt(
                f"{where}: its columns have {sorted(lengths)} rows, {self.first_sample[-1]} are expected"
            )
        arrays = {len(stored_fields(shard.layout)) for shard in self.shards if shard.layout is not None}
        if (problem := _problem(columns, arrays=arrays)) is not None:
            raise CacheCorrupt(f"{where}: {problem}")
        # it knows nothing of ``self``: an index in no cycle is unmapped when it is let go
        self.rows_of_shard = lru_cache(maxsize=_SHARD_TABLES)(
            partial(_rows_of_shard, columns, self.shards, self.first_sample, first_turn, where)
        )

    @classmethod
    def from_records(
        cls, records: Iterable[tuple[CommitRecord, FileDigest]], *, digests: Mapping[str, str], where: str = "index"
    ) -> "SampleIndex":
        """Make the index of some committed shards, in this order.

        Args:
            records: Standing records, each with the digest of its document.
            digests: SHA-256 (hex) of every sample's content by id.
            where: Named in errors.
        """
        chosen = list(records)
        ids = [sample_id for record, _ in chosen for sample_id in record.sample_ids]
        encoded = [sample_id.encode() for sample_id in ids]
        keys = np.array([_key(sample_id) for sample_id in ids], dtype=np.uint64)
        order = np.argsort(keys, kind="stable")
        layouts = [record.layout for record, _ in chosen if record.layout is not None]
        rows = join_rows((record.rows for record, _ in chosen), arrays=len(stored_fields(layouts[0])) if layouts else 0)
        entries = [_entry(record, digest) for record, digest in chosen]
        columns = _Columns(
            id_bytes=np.frombuffer(b"".join(encoded), dtype=np.uint8),
            id_offsets=np.concatenate([[0], np.cumsum([len(text) for text in encoded], dtype=np.int64)]),
            digests=np.frombuffer(bytes.fromhex("".join(digests[id_] for id_ in ids)), dtype=np.uint8).reshape(-1, 32),
            counts=rows.counts,
            spans=rows.spans,
            crc32c=rows.crc32c,
            keys=keys[order],
            key_order=order.astype(np.uint32),
            shards=np.frombuffer(_ENTRIES.dump_json(tuple(entries)), dtype=np.uint8),
        )
        return cls(columns, where=where)

    @classmethod
    def map_file(cls, path: Path, *, where: str) -> "SampleIndex":
        """Map an index that :meth:`encode` made.

        Raises:
            CacheCorrupt: the file is no such index.
        """
        try:
            with safe_open(path, framework="pt") as file:
                columns = _Columns(**{field.name: file.get_tensor(field.name).numpy() for field in fields(_Columns)})
        except Exception as error:
            raise CacheCorrupt(f"{where}: no index of samples: {type(error).__name__}: {error}") from error
        return cls(columns, where=where)

    def encode(self) -> bytes:
        """Return the bytes of the index, the same for the same shards."""
        return save(
            {field.name: np.ascontiguousarray(getattr(self._columns, field.name)) for field in fields(_Columns)}
        )

    @cached_property
    def sample_ids(self) -> tuple[str, ...]:
        """Ids of all samples, in planned order."""
        text, offsets = self._columns.id_bytes.tobytes(), self._columns.id_offsets.tolist()
        return tuple(self._decode(text[start:stop]) for start, stop in pairwise(offsets))

    def sample_id(self, position: int) -> str:
        """Return the id of the sample at a position of the planned order."""
        start, stop = self._columns.id_offsets[position : position + 2]
        return self._decode(self._columns.id_bytes[start:stop].tobytes())

    def position(self, sample_id: str) -> int | None:
        """Return where a sample stands in the planned order, or None when it is not stored."""
        key = np.uint64(_key(sample_id))
        place = int(np.searchsorted(self._columns.keys, key))
        while place < len(self._columns.keys) and self._columns.keys[place] == key:
            position = int(self._columns.key_order[place])
            if self.sample_id(position) == sample_id:
                return position
            place += 1
        return None

    def shard_of(self, position: int) -> int:
        """Return the number of the shard that holds the sample at a position."""
        return int(np.searchsorted(self.first_sample, position, side="right")) - 1

    def digest(self, position: int) -> str:
        """Return the SHA-256 (hex) of a sample's content."""
        return self._columns.digests[position].tobytes().hex()

    def tier_bytes(self) -> dict[str, int]:
        """Return the stored bytes per tier: A, Q and L."""
        totals: dict[str, int] = dict.fromkeys(TIERS, 0)
        for shard in self.shards:
            for tier, size in shard.tier_bytes.items():
                totals[tier] += size
        return totals

    def counts(self, position: int) -> list[int]:
        """Return a sample's counts, as ``ledger.COUNTS`` names them."""
        return [int(count) for count in self._columns.counts[position]]

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._columns, self._where)

    def _decode(self, sample_id: bytes) -> str:
        try:
            return sample_id.decode()
        except UnicodeDecodeError as error:
            raise CacheCorrupt(f"{self._where}: the id of a sample is no text: {error}") from error

    def _per_sample(self) -> Sequence[np.ndarray]:
        columns = self._columns
        return columns.digests, columns.counts, columns.crc32c, columns.keys, columns.key_order


def _problem(columns: _Columns, *, arrays: set[int]) -> str | None:
    """Return what makes these columns impossible, their lengths aside, or None."""
    for name, (dtype, shape) in _FORMS.items():
        column = getattr(columns, name)
        if column.dtype != np.dtype(dtype) or column.shape[1:] != shape:
            return f"its column {name} is {column.dtype} of shape {column.shape}"
    if columns.crc32c.dtype != np.uint32 or columns.crc32c.ndim != 2 or not arrays <= {columns.crc32c.shape[1]}:
        return f"its column crc32c is {columns.crc32c.dtype} of shape {columns.crc32c.shape}"
    offsets, keys = columns.id_offsets, columns.keys
    if (int(offsets[0]), int(offsets[-1])) != (0, len(columns.id_bytes)) or (offsets[1:] < offsets[:-1]).any():
        return "the ids of its samples are out of order, or beyond their text"
    if (keys[1:] < keys[:-1]).any() or columns.key_order.max(initial=0) >= max(len(keys), 1):
        return "its keys are out of order, or belong to no sample"
    return None


def tier_bytes(record: CommitRecord) -> dict[Tier, int]:
    """Return the stored bytes of a shard's arrays per tier."""
    totals: dict[Tier, int] = {"A": 0, "Q": 0, "L": 0}
    if record.layout is not None:
        arrays = stored_fields(record.layout)
        for path, digest in record.files.items():
            if (name := path.split("/")[0]) in arrays:
                totals[arrays[name].tier] += digest.size_bytes
    return totals


def _entry(record: CommitRecord, digest: FileDigest) -> ShardEntry:
    own: dict[str, Any] = {
        name: getattr(record, name) for name in ("shard_id", "revision", "attempt", "layout", "tiers", "skipped")
    }
    return ShardEntry(
        **own,
        record=digest,
        samples=len(record.sample_ids),
        turns=len(record.rows.spans),
        tier_bytes=tier_bytes(record),
    )


def _rows_of_shard(
    columns: _Columns,
    entries: Sequence[ShardEntry],
    first_sample: Int64[np.ndarray, " shards+1"],
    first_turn: Int64[np.ndarray, " shards+1"],
    where: str,
    shard: int,
) -> SampleRows:
    samples, turns = (slice(*first[shard : shard + 2]) for first in (first_sample, first_turn))
    rows = SampleRows(counts=columns.counts[samples], spans=columns.spans[turns], crc32c=columns.crc32c[samples])
    if (problem := rows.problem()) is not None:
        raise CacheCorrupt(f"{where}: shard {entries[shard].shard_id} has {problem}")
    return rows


def _rebuild(columns: _Columns, where: str) -> SampleIndex:
    return SampleIndex(columns, where=where)


def _key(sample_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=8).digest(), "little")
