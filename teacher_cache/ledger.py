"""Commit records: one per shard, written once. What no record names is not in the cache.

A record is JSON rather than Parquet: it carries its own digest, so every byte is checked before anything
is parsed (Parquet's own checksums leave the footer out), and it can be read without a library.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from jaxtyping import Int
from pydantic import Field, JsonValue, model_validator

from teacher_cache.codec import AXES, Axis, Layout
from teacher_cache.documents import encode_document
from teacher_cache.errors import CacheCorrupt
from teacher_cache.manifest import Plan, PlannedShard, StoredModel, parse_model
from teacher_cache.schema import SkippedSample
from teacher_cache.storage import COMMITS, SHARDS, FileDigest, digest_bytes, read_committed

Count = Annotated[int, Field(ge=0, lt=2**31)]
Checksum = Annotated[int, Field(ge=0, lt=2**32)]


class SampleTable(StoredModel):
    """One row per stored sample, as columns. Row ranges are the running sums of the counts."""

    sample_id: tuple[str, ...]
    digest: tuple[str, ...]
    num_tokens: tuple[Count, ...]
    num_turns: tuple[Count, ...]
    answer_tokens: tuple[Count, ...]
    question_rows: tuple[Count | None, ...]
    """None where tier Q is not stored."""
    crc32: dict[str, tuple[Checksum, ...]]
    """Per field, over the stored bytes of the sample's rows."""

    @model_validator(mode="after")
    def _require_equal_lengths(self) -> "SampleTable":
        columns = [self.digest, self.num_tokens, self.num_turns, self.answer_tokens, self.question_rows]
        if {len(column) for column in [*columns, *self.crc32.values()]} != {len(self.sample_id)}:
            raise ValueError("columns of unequal length")
        return self

    def counts(self, axis: Axis) -> Int[np.ndarray, " samples"]:
        """Return each sample's number of rows on one axis."""
        columns: dict[Axis, Sequence[int]] = {
            "tokens": self.num_tokens,
            "turns": self.num_turns,
            "tier_q": [rows or 0 for rows in self.question_rows],
            "answer_tokens": self.answer_tokens,
        }
        if axis == "tier_a":
            return self.counts("answer_tokens") + self.counts("turns")
        return np.array(columns[axis], dtype=np.int64)

    def offsets(self) -> "dict[Axis, Int[np.ndarray, ' samples+1']]":
        """Return, per axis, the first row of each sample, and the total at the end."""
        return {axis: np.concatenate([[0], np.cumsum(self.counts(axis))]).astype(np.int64) for axis in AXES}


class CommitRecord(StoredModel):
    """Everything that one committed shard holds."""

    shard_id: str
    attempt: str = Field(pattern=r"^[0-9a-f]{32}$")
    """Nonce of the attempt that won; part of the folder's name."""
    fingerprint: str
    layout: Layout | None
    """None in a shard whose samples were all skipped: it has no folder."""
    samples: SampleTable
    skipped: tuple[SkippedSample, ...]
    files: dict[str, FileDigest]
    """By path relative to the shard's folder."""
    provenance: dict[str, JsonValue]

    @model_validator(mode="after")
    def _require_layout_iff_samples(self) -> "CommitRecord":
        if bool(self.samples.sample_id) != (self.layout is not None):
            raise ValueError("samples and layout must be given together")
        return self

    def encode(self) -> bytes:
        """Return the bytes of the record."""
        return encode_document(self.model_dump(mode="json"))

    def folder(self, root: Path) -> Path:
        """Return the folder of the shard."""
        return root / SHARDS / f"{self.shard_id}-{self.attempt}"


def record_path(root: Path, shard_id: str) -> Path:
    """Return where the commit record of a shard lies."""
    return root / COMMITS / f"{shard_id}.json"


def committed_shards(root: Path, plan: Plan) -> list[PlannedShard]:
    """Return the planned shards that have a commit record, in planned order.

    Raises:
        CacheCorrupt: the folder of the commit records is missing.
    """
    try:
        names = {path.name for path in (root / COMMITS).iterdir()}
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheCorrupt(f"{root / COMMITS} is missing: without commit records nothing is in the cache") from error
    return [shard for shard in plan.shards if f"{shard.shard_id}.json" in names]


def read_record(root: Path, shard: PlannedShard, *, fingerprint: str, sealed: FileDigest | None = None) -> CommitRecord:
    """Read and check one commit record, also against the digest that a completed cache holds of it.

    Raises:
        CacheCorrupt: it differs from what was written, or belongs to another cache or plan.
    """
    path = record_path(root, shard.shard_id)
    data = read_committed(path, where=f"shard {shard.shard_id}")
    where = f"shard {shard.shard_id}: {path}"
    if sealed is not None and sealed != digest_bytes(data):
        raise CacheCorrupt(f"{where} was changed after the cache was completed")
    record = parse_model(CommitRecord, data, where=where)
    if (record.shard_id, record.fingerprint) != (shard.shard_id, fingerprint):
        raise CacheCorrupt(
            f"{where} belongs to shard {record.shard_id} of cache {record.fingerprint[:16]}, "
            f"expected shard {shard.shard_id} of cache {fingerprint[:16]}"
        )
    found = [*record.samples.sample_id, *(sample.sample_id for sample in record.skipped)]
    if sorted(found) != sorted(shard.sample_ids):
        raise CacheCorrupt(f"{where} does not hold the planned samples of the shard")
    return record
