"""How many bytes and files a cache takes, from the row counts of its shards alone: no tensor, no store.

Every length is that of what the writers themselves would make: the same fields, geometries and documents. Only the
ratio of lossless compression is assumed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from jaxtyping import Shaped
from pydantic import JsonValue

from teacher_cache.build_plan import build_provenance, identity_of
from teacher_cache.codec import Field, Layout, encode_teacher_head, stored_fields
from teacher_cache.config import CacheConfig
from teacher_cache.documents import encode_document
from teacher_cache.durable_files import FileDigest, digest_bytes
from teacher_cache.ledger import COUNTS, CommitRecord, SampleRows
from teacher_cache.manifest import MANIFEST, HeadEntry, Manifest, fingerprint
from teacher_cache.plan import PlannedShard, first_generation
from teacher_cache.row_codec import QuantizationCost
from teacher_cache.sample_index import SampleIndex, tier_bytes
from teacher_cache.schema import SkippedSample, TeacherHead, Tier
from teacher_cache.shard_writer import OFFSETS, offsets_field, shard_attributes, shard_metadata
from teacher_cache.snapshot import Snapshot, index_name
from teacher_cache.zarr_format import CRC_BYTES, ArrayGeometry, object_name

ZSTD_RATIOS: Final = {
    "bfloat16": 1.43,
    "float16": 1.16,
    "float32": 1.18,
    "float8_e4m3fn": 1.17,
    "int32": 1.8,
}
"""Bytes before over bytes after `compress_chunk`, by what the elements stand for: bfloat16 as measured on the hidden
states of trained models, the others on random rows of like spread and on ids below 2^18."""

_HEX = "0" * 64
_PROVENANCE: Final[dict[str, JsonValue]] = {
    "engine": "vllm",
    "engine_version": "0.32.0",
    "actor_id": "0" * 32,
    "pid": "0" * 6,
    "host": "0" * 20,
    "head_difference_nats": 1.2345678901234567e-06,
}
"""Of the length that a build's own has."""
_COST = QuantizationCost(
    rows=256, kl_mean_nats=0.00012345678901234567, kl_max_nats=0.0012345678901234567, relative_error=0.0234567890123456
)


@dataclass(frozen=True, kw_only=True)
class ShardShape:
    """What decides the size of some shards that are alike."""

    sample_ids: tuple[str, ...]
    """Of the stored samples; only their lengths matter."""
    rows: SampleRows
    skipped: tuple[SkippedSample, ...] = ()
    shards: int = 1
    """How many there are of this shape."""


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """Sizes of the teacher's output projection."""

    vocab_size: int
    hidden_size: int
    has_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class CacheSize:
    """Bytes and files of a complete cache."""

    shards: int
    files: int
    tier_bytes: dict[Tier, int]
    """Of the arrays, padding and checksums included, as `genrecal cache status` tells them."""
    head_bytes: int
    document_bytes: int
    """Metadata of the arrays, commit records, plan, manifest, snapshot and index of samples."""

    @property
    def total_bytes(self) -> int:
        """All files of the cache."""
        return sum(self.tier_bytes.values()) + self.head_bytes + self.document_bytes


def sample_rows(counts: Shaped[np.ndarray, "samples 4"]) -> SampleRows:
    """Return the table of samples of which only the counts are known, in the order of ``ledger.COUNTS``."""
    counts = counts.reshape(-1, len(COUNTS)).astype(np.int32)
    turns = int(counts[:, COUNTS.index("num_turns")].sum())
    # spans and checksums have a fixed length, whatever they say
    return SampleRows(
        counts=counts, spans=np.zeros((turns, 2), dtype=np.int32), crc32c=np.zeros((len(counts), 0), dtype=np.uint32)
    )


def cache_size(config: CacheConfig, shapes: Sequence[ShardShape], *, layout: Layout, head: HeadShape) -> CacheSize:
    """Return what a cache with shards of these shapes takes.

    Args:
        config: What the manifest names; its codec and compression are those of ``layout``.
        shapes: At least one.
        layout: How the rows are stored.
        head: Sizes of the teacher's head.
    """
    shards = [_Shard.of(shape, layout=layout) for shape in shapes]
    documents = _documents(config, shards, head=head)
    tiers: dict[Tier, int] = {
        tier: sum(tier_bytes(shard.record)[tier] * shard.count for shard in shards) for tier in ("A", "Q", "L")
    }
    of_shards = sum(
        shard.count * (sum(digest.size_bytes for digest in shard.record.files.values()) + len(shard.record.encode()))
        for shard in shards
    )
    return CacheSize(
        shards=sum(shard.count for shard in shards),
        files=sum(shard.count * (len(shard.record.files) + 1) for shard in shards) + len(documents) + 1,
        tier_bytes=tiers,
        head_bytes=head_bytes(head, dtype=layout.dtype),
        document_bytes=of_shards - sum(tiers.values()) + sum(documents.values()),
    )


def shard_file_bytes(shape: ShardShape, *, layout: Layout) -> dict[str, int]:
    """Return the length of each file in the folder of one shard, by path."""
    if not shape.sample_ids:
        return {}
    rows = {name: int(shape.rows.offsets[field.axis][-1]) for name, field in stored_fields(layout).items()}
    geometries = {
        name: ArrayGeometry(field=field, num_rows=rows[name], compression=layout.compression)
        for name, field in stored_fields(layout).items()
    }
    geometries[OFFSETS] = ArrayGeometry(field=offsets_field(), num_rows=len(shape.sample_ids) + 1, compression="none")
    attributes = shard_attributes(fingerprint=_HEX, shard_id=_shard_id(0), sample_ids=shape.sample_ids)
    metadata = shard_metadata(geometries, attributes=attributes)
    objects = {
        object_name(name, geometry): object_bytes(geometry)
        for name, geometry in geometries.items()
        if geometry.num_rows
    }
    return {**{name: len(data) for name, data in metadata.items()}, **objects}


def object_bytes(geometry: ArrayGeometry) -> int:
    """Return the length of an array's object, compressed by the assumed ratio where it is compressed."""
    if geometry.compression == "none":
        return geometry.object_bytes
    data = geometry.num_rows * geometry.field.row_bytes / zstd_ratio(geometry.field)
    return round(data) + geometry.num_chunks * CRC_BYTES + geometry.index_bytes


def zstd_ratio(field: Field) -> float:
    """Return the compression that is assumed for one array."""
    return ZSTD_RATIOS[field.float_type or field.dtype.name]


def head_bytes(head: HeadShape, *, dtype: str) -> int:
    """Return the length of the file that holds the teacher's output projection, give or take its padding."""
    small = torch.zeros(1, dtype=getattr(torch, dtype))
    frame = encode_teacher_head(TeacherHead(weight=small[None], bias=small if head.has_bias else None))
    elements = head.vocab_size * (head.hidden_size + head.has_bias)
    return len(frame) + (elements - 1 - head.has_bias) * small.element_size()


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """Some shards that are alike, as committed."""

    record: CommitRecord
    count: int

    @classmethod
    def of(cls, shape: ShardShape, *, layout: Layout) -> "_Shard":
        arrays = np.zeros((len(shape.sample_ids), len(stored_fields(layout))), dtype=np.uint32)
        files = shard_file_bytes(shape, layout=layout)
        record = CommitRecord(
            shard_id=_shard_id(0),
            attempt=_HEX[:32],
            fingerprint=_HEX,
            sample_ids=shape.sample_ids,
            rows=replace(shape.rows, crc32c=arrays),
            skipped=shape.skipped,
            layout=layout if shape.sample_ids else None,
            files={name: FileDigest(size_bytes=size, blake3=_HEX) for name, size in files.items()},
            provenance=_PROVENANCE,
            codec_cost=_COST if layout.codec == "fp8" and shape.sample_ids else None,
        )
        return cls(record=record, count=shape.shards)

    @property
    def planned(self) -> PlannedShard:
        ids = (*self.record.sample_ids, *(sample.sample_id for sample in self.record.skipped))
        return PlannedShard(shard_id=self.record.shard_id, sample_ids=ids, sample_digests=(_HEX,) * len(ids))


def _documents(config: CacheConfig, shards: Sequence[_Shard], *, head: HeadShape) -> Mapping[str, int]:
    """Return the length of each document of the whole cache, by name."""
    plan_bytes = _length(lambda chosen: first_generation([shard.planned for shard in chosen])[0], shards)
    index_bytes = _length(_index, shards)
    _, plan_entry = first_generation([shards[0].planned])
    identity = identity_of(
        config,
        teacher={"dtype": config.teacher.dtype, "config": _HEX, "weights": _HEX},
        processing={"tokenizer": _HEX, "processor": _HEX, "chat_template": _HEX},
    )
    any_file = digest_bytes(b"")
    head_entry = HeadEntry(
        file=f"teacher_head-{_HEX[:16]}.safetensors",
        digest=any_file,
        vocab_size=head.vocab_size,
        hidden_size=head.hidden_size,
    )
    manifest = Manifest(
        identity=identity,
        fingerprint=fingerprint(identity),
        codec=config.targets.codec,
        plan=plan_entry,
        teacher_head=head_entry,
        provenance=build_provenance(config, skipped=()),
    ).encode()
    index = index_name(b"")
    snapshot = Snapshot(
        number=0,
        fingerprint=_HEX,
        data={"samples": sum(len(shard.planned.sample_ids) * shard.count for shard in shards), "digest": _HEX},
        index=index,
        files=dict.fromkeys((MANIFEST, index, plan_entry.file, head_entry.file), any_file),
    )
    return {
        MANIFEST: len(manifest),
        "plan": plan_bytes,
        "index": index_bytes,
        "snapshot": len(encode_document(snapshot.model_dump(mode="json"))),
    }


def _index(shards: Sequence[_Shard]) -> bytes:
    ids: list[str] = [sample_id for shard in shards for sample_id in shard.record.sample_ids]
    records = [(shard.record, digest_bytes(b"")) for shard in shards]
    return SampleIndex.from_records(records, digests=dict.fromkeys(ids, _HEX)).encode()


def _length(encode: Callable[[Sequence[_Shard]], bytes], shards: Sequence[_Shard]) -> int:
    """Return the length of a document that grows by the same with each shard of a shape."""
    growth = [len(encode([shard, shard])) - len(encode([shard])) for shard in shards]
    more = sum(grown * shard.count for grown, shard in zip(growth, shards, strict=True)) - growth[0]
    return len(encode(shards[:1])) + more


def _shard_id(number: int) -> str:
    return f"shard-{number:06}"
