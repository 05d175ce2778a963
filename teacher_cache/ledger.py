"""Commit records: what no standing record names is not in the cache.

A record is a JSON document with its own digest, so every byte is checked before anything is parsed. Numbers per
sample are kept as base64 of little-endian integers: a million samples open in about a second.
"""

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Final

import numpy as np
from jaxtyping import Int, Int32, UInt32
from pydantic import AfterValidator, Field, JsonValue, model_validator

from teacher_cache.codec import AXES, Axis, Layout, stored_fields
from teacher_cache.documents import encode_document
from teacher_cache.durable_files import FileDigest
from teacher_cache.errors import CacheCorrupt
from teacher_cache.manifest import StoredModel, parse_model
from teacher_cache.row_codec import QuantizationCost
from teacher_cache.schema import TIERS, SkippedSample, Span, Tier

COMMITS: Final = "commits"
SHARDS: Final = "shards"
COUNTS: Final = ("num_tokens", "num_turns", "answer_tokens", "question_rows")
"""Columns of the counts of a sample; ``question_rows`` is -1 where tier Q is not stored."""
LAST_REVISION: Final = 9999


@dataclass(frozen=True, kw_only=True)
class SampleRows:
    """The stored samples of a shard, or of a cache: one row per sample, in planned order."""

    counts: Int32[np.ndarray, "samples 4"]
    spans: Int32[np.ndarray, "turns 2"]
    """Answer spans of all samples, one after the other."""
    crc32c: UInt32[np.ndarray, "samples arrays"]
    """Over the stored bytes of the sample's rows, one column per array of the layout, in its order."""

    def axis_counts(self, axis: Axis) -> Int[np.ndarray, " samples"]:
        """Return each sample's number of rows on one axis."""
        tokens, turns, answer, question = (self.counts[:, column].astype(np.int64) for column in range(len(COUNTS)))
        return {
            "tokens": tokens,
            "turns": turns,
            "tier_a": answer + turns,
            "tier_q": np.maximum(question, 0),
            "answer_tokens": answer,
        }[axis]

    @cached_property
    def offsets(self) -> "dict[Axis, Int[np.ndarray, ' samples+1']]":
        """Per axis, the first row of each sample, and the total at the end."""
        return {axis: np.concatenate([[0], np.cumsum(self.axis_counts(axis))]) for axis in AXES}

    def spans_of(self, sample: int) -> tuple[Span, ...]:
        """Return the answer spans of one sample."""
        first, stop = self.offsets["turns"][sample : sample + 2]
        return tuple(Span(start, end) for start, end in self.spans[first:stop].tolist())

    def problem(self) -> str | None:
        """Return what makes these numbers impossible, or None."""
        tokens, turns, answer, question = self.counts.astype(np.int64).T
        if (self.counts[:, :3] < 0).any() or int(turns.sum()) != len(self.spans):
            return "a negative count, or spans that are not as many as the turns"
        first = self.offsets["turns"]
        sample = np.repeat(np.arange(len(turns)), turns)
        starts, stops = self.spans.astype(np.int64).T
        follows = np.concatenate([[0], stops[:-1]]) if len(stops) else stops
        follows[first[:-1][turns > 0]] = 1
        if (starts < np.maximum(follows, 1)).any() or (stops <= starts).any() or (stops > tokens[sample]).any():
            return "answer spans out of order, empty, or beyond the sample's tokens"
        if (np.bincount(sample, weights=stops - starts, minlength=len(turns)) != answer).any():
            return "answer_tokens that differ from the spans"
        if ((question != -1) & (question != tokens - answer - turns)).any():
            return "question_rows that differ from the other tokens"
        return None


def _require_served_tiers(tiers: tuple[Tier, ...]) -> tuple[Tier, ...]:
    if sorted(tiers) not in (["A", "L"], ["A", "L", "Q"]):
        raise ValueError(f"tiers {tiers}; only tier Q may be absent")
    return tiers


StoredTiers = Annotated[tuple[Tier, ...], AfterValidator(_require_served_tiers)]
Revision = Annotated[int, Field(ge=0, le=LAST_REVISION)]
Attempt = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class _Samples(StoredModel):
    sample_id: tuple[str, ...]
    counts: str
    spans: str
    crc32c: str


class _Document(StoredModel):
    """Content of commits/<shard_id>.<revision>.json."""

    shard_id: str
    revision: Revision
    attempt: Attempt
    fingerprint: str
    withdrawn: str | None
    layout: Layout | None
    tiers: StoredTiers
    samples: _Samples
    skipped: tuple[SkippedSample, ...]
    files: dict[str, FileDigest]
    codec_cost: QuantizationCost | None
    provenance: dict[str, JsonValue]

    @model_validator(mode="after")
    def _require_layout_iff_samples(self) -> "_Document":
        if bool(self.samples.sample_id) != (self.layout is not None):
            raise ValueError("samples and layout must be given together")
        return self


@dataclass(frozen=True, kw_only=True)
class CommitRecord:
    """Everything that one committed shard holds."""

    shard_id: str
    attempt: str
    """Nonce of the attempt that won, 32 hex digits; part of the folder's name."""
    fingerprint: str
    """Of the manifest."""
    sample_ids: tuple[str, ...]
    rows: SampleRows
    skipped: tuple[SkippedSample, ...]
    layout: Layout | None
    """None in a shard whose samples were all skipped: it has no folder."""
    files: dict[str, FileDigest]
    """By path relative to the shard's folder."""
    provenance: dict[str, JsonValue]
    revision: int = 0
    withdrawn: str | None = None
    """Why the shard is to be built again; such a record holds no samples."""
    tiers: tuple[Tier, ...] = TIERS
    """Tiers whose files exist."""
    codec_cost: QuantizationCost | None = None
    """What 8-bit hidden states cost, measured while writing."""

    def encode(self) -> bytes:
        """Return the bytes of the record."""
        samples = _Samples(
            sample_id=self.sample_ids,
            counts=_base64(self.rows.counts, "<i4"),
            spans=_base64(self.rows.spans, "<i4"),
            crc32c=_base64(self.rows.crc32c, "<u4"),
        )
        own = {name: getattr(self, name) for name in _Document.model_fields if name != "samples"}
        return encode_document(_Document(samples=samples, **own).model_dump(mode="json"))

    @property
    def folder(self) -> str:
        """Name of the shard's folder."""
        return f"{SHARDS}/{self.shard_id}-{self.attempt}"

    @property
    def name(self) -> str:
        """Name of the record itself."""
        return record_name(self.shard_id, self.revision)


def no_rows() -> SampleRows:
    """Return the table of a shard without samples."""
    return SampleRows(
        counts=np.zeros((0, len(COUNTS)), dtype=np.int32),
        spans=np.zeros((0, 2), dtype=np.int32),
        crc32c=np.zeros((0, 0), dtype=np.uint32),
    )


def record_name(shard_id: str, revision: int) -> str:
    """Return where a commit record lies."""
    return f"{COMMITS}/{shard_id}.{revision}.json"


def decode_record(data: bytes, *, where: str) -> CommitRecord:
    """Parse the bytes of a record.

    Raises:
        CacheCorrupt: they differ from what was written, or their numbers cannot be.
    """
    document = parse_model(_Document, data, where=where)
    samples, layout = document.samples, document.layout
    arrays = 0 if layout is None else len(stored_fields(layout))
    num_samples = len(samples.sample_id)
    try:
        rows = SampleRows(
            counts=_integers(samples.counts, "<i4", columns=len(COUNTS), rows=num_samples),
            spans=_integers(samples.spans, "<i4", columns=2, rows=None),
            crc32c=_integers(samples.crc32c, "<u4", columns=arrays, rows=num_samples),
        )
        problem = rows.problem()
    except ValueError as error:
        problem = str(error)
    if problem is not None:
        raise CacheCorrupt(f"{where}: its table of samples holds {problem}")
    own = {name: getattr(document, name) for name in _Document.model_fields if name != "samples"}
    return CommitRecord(sample_ids=samples.sample_id, rows=rows, **own)


def join_rows(tables: Iterable[SampleRows], *, arrays: int) -> SampleRows:
    """Put the tables of several shards one after the other."""
    kept = [table for table in tables if len(table.counts)]
    empty = no_rows()
    return SampleRows(
        counts=np.concatenate([empty.counts, *(table.counts for table in kept)]),
        spans=np.concatenate([empty.spans, *(table.spans for table in kept)]),
        crc32c=np.concatenate([np.zeros((0, arrays), dtype=np.uint32), *(table.crc32c for table in kept)]),
    )


def _base64(table: np.ndarray, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(table, dtype=dtype).tobytes()).decode()


def _integers(text: str, dtype: str, *, columns: int, rows: int | None) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(text, validate=True), dtype=dtype)
    if rows is None:
        rows = len(data) // max(columns, 1)
    if len(data) != rows * columns:
        raise ValueError(f"{len(data)} numbers where {rows} x {columns} are expected")
    return data.reshape(rows, columns)
