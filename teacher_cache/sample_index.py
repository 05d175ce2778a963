"""All stored samples of a cache as columns: found by id, mapped into memory rather than read, bounded in size."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8, UInt32, UInt64
from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open
from safetensors.numpy import save

from teacher_cache.codec import Layout, stored_fields
from teacher_cache.durable_files import FileDigest
from teacher_cache.errors import CacheCorrupt
from teacher_cache.ledger import SHARDS, CommitRecord, SampleRows, join_rows, record_name
from teacher_cache.manifest import StoredModel
from teacher_cache.schema import SkippedSample, Tier

_SHARD_TABLES = 256


class ShardEntry(StoredModel):
    """What reading a shard needs, beside the rows of its samples."""

    shard_id: str
    revision: int
    attempt: str
    record: FileDigest
    layout: Layout | None
    tiers: tuple[Tier, ...]
    samples: int
    turns: int
    tier_bytes: dict[Tier, int]
    """Stored bytes of the arrays of each tier."""
    skipped: tuple[SkippedSample, ...]

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
        self._first_turn = np.concatenate([[0], np.cumsum([shard.turns for shard in self.shards], dtype=np.int64)])
        lengths = {len(columns.id_offsets) - 1, *(len(column) for column in self._per_sample())}
        if lengths != {int(self.first_sample[-1])} or len(columns.spans) != int(self._first_turn[-1]):
            raise CacheCorrupt(
                f"{where}: its columns have {sorted(lengths)} rows, {self.first_sample[-1]} are expected"
            )
        self.rows_of_shard = lru_cache(maxsize=_SHARD_TABLES)(self._rows_of_shard)

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
        return tuple(text[start:stop].decode() for start, stop in pairwise(offsets))

    def sample_id(self, position: int) -> str:
        """Return the id of the sample at a position of the planned order."""
        start, stop = self._columns.id_offsets[position : position + 2]
        return self._columns.id_bytes[start:stop].tobytes().decode()

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

    def counts(self, position: int) -> list[int]:
        """Return a sample's counts, as ``ledger.COUNTS`` names them."""
        return [int(count) for count in self._columns.counts[position]]

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._columns, self._where)

    def _rows_of_shard(self, shard: int) -> SampleRows:
        first, stop = self.first_sample[shard : shard + 2]
        first_turn, stop_turn = self._first_turn[shard : shard + 2]
        rows = SampleRows(
            counts=self._columns.counts[first:stop],
            spans=self._columns.spans[first_turn:stop_turn],
            crc32c=self._columns.crc32c[first:stop],
        )
        if (problem := rows.problem()) is not None:
            raise CacheCorrupt(f"{self._where}: shard {self.shards[shard].shard_id} has {problem}")
        return rows

    def _per_sample(self) -> Sequence[np.ndarray]:
        columns = self._columns
        return columns.digests, columns.counts, columns.crc32c, columns.keys, columns.key_order


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


def _rebuild(columns: _Columns, where: str) -> SampleIndex:
    return SampleIndex(columns, where=where)


def _key(sample_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=8).digest(), "little")
