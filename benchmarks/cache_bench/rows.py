"""Simulated targets, caches made of them, and where the bytes of a sample lie."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import BFloat16
from torch import Tensor

from teacher_cache.codec import stored_fields
from teacher_cache.config import Compression, RowCodec
from teacher_cache.ledger import CommitRecord
from teacher_cache.manifest import read_manifest
from teacher_cache.plan import PlannedShard, read_plan
from teacher_cache.schema import Span, TeacherTargets
from teacher_cache.standing import read_standing
from teacher_cache.storage import open_store
from teacher_cache.writer import CacheWriter, create_or_open_builder
from teacher_cache.zarr_format import CRC_BYTES, ArrayGeometry, object_name

VOCAB = 150_000
_BLOCK_ROWS = 2048


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of simulated samples."""

    hidden: int
    topk: int
    mean_tokens: int
    answer_tokens: int | None = None
    """Length of every answer; by default 100 to 300, less in a short sample."""
    questions: bool = True


def heavy_tailed(rows: int, hidden: int, *, seed: int) -> BFloat16[Tensor, "rows hidden"]:
    """Return rows like hidden states: heavy tails, channels of different scale, a few outlier channels.

    Rows repeat after 2,048, which is farther than any chunk or compression window reaches.
    """
    generator = torch.Generator().manual_seed(seed)
    block = min(rows, _BLOCK_ROWS)
    normal = torch.randn(block, hidden, generator=generator)
    chi_square = torch.stack([torch.randn(block, hidden, generator=generator).square_() for _ in range(4)]).sum(dim=0)
    scale = torch.exp(0.5 * torch.randn(hidden, generator=generator))
    scale[torch.randperm(hidden, generator=generator)[: max(hidden // 500, 1)]] *= 60
    values = normal * (4 / chi_square).sqrt_() * scale * torch.exp(0.3 * torch.randn(block, 1, generator=generator))
    result = torch.empty(rows, hidden, dtype=torch.bfloat16)
    for start in range(0, rows, block):
        part = result[start : start + block]
        part.copy_(values[: len(part)])
    return result


def make_samples(count: int, *, shape: Shape, seed: int = 0) -> list[TeacherTargets]:
    """Return samples of log-normal length, a quarter to four times the mean, one turn each."""
    rng = np.random.default_rng(seed)
    lengths = shape.mean_tokens * np.exp(rng.normal(-0.18, 0.6, count))
    lengths = np.clip(lengths, shape.mean_tokens // 4, 4 * shape.mean_tokens).astype(int)
    rows = int(lengths.sum()) if shape.questions else (shape.answer_tokens or 300) * count + count
    pool = heavy_tailed(rows, shape.hidden, seed=seed)
    samples, start = [], 0
    for number, tokens in enumerate(lengths.tolist()):
        sample = _sample(f"sample-{seed}-{number:06}", tokens, pool[start:], shape=shape, rng=rng)
        start += sum(len(rows) for rows in (sample.hidden_states, sample.question_hidden_states) if rows is not None)
        samples.append(sample)
    return samples


def _sample(
    sample_id: str,
    tokens: int,
    pool: BFloat16[Tensor, "rows hidden"],
    *,
    shape: Shape,
    rng: np.random.Generator,
) -> TeacherTargets:
    answer = shape.answer_tokens or int(rng.integers(min(100, tokens // 4), min(300, tokens // 2)))
    tokens = max(tokens, answer + 2)
    rest = tokens - answer - 1
    logits = torch.from_numpy(np.sort(rng.normal(0, 2, (answer, shape.topk)).astype(np.float32))[:, ::-1].copy())
    logprobs = logits - logits.logsumexp(dim=1, keepdim=True)
    return TeacherTargets(
        sample_id=sample_id,
        token_ids=torch.from_numpy(rng.integers(0, VOCAB, tokens)),
        spans=(Span(tokens - answer, tokens),),
        hidden_states=pool[: answer + 1],
        question_hidden_states=pool[answer + 1 :][:rest] if shape.questions else None,
        topk_ids=torch.from_numpy(rng.integers(0, VOCAB, (answer, shape.topk))),
        topk_logprobs=logprobs,
        logsumexp=torch.from_numpy(rng.normal(10, 1, answer).astype(np.float32)),
        target_logprobs=logprobs[:, 1].clone(),
        answer_byte_ends=torch.arange(answer),
    )


def digest_of(sample_id: str) -> str:
    """Return the SHA-256 (hex) that stands for a sample's content."""
    return hashlib.sha256(sample_id.encode()).hexdigest()


def plan_of(sample_ids: Sequence[str], *, per_shard: int) -> list[PlannedShard]:
    """Group samples into shards."""
    groups = [sample_ids[start : start + per_shard] for start in range(0, len(sample_ids), per_shard)]
    return [
        PlannedShard(
            shard_id=f"shard-{number:06}", sample_ids=tuple(group), sample_digests=tuple(map(digest_of, group))
        )
        for number, group in enumerate(groups)
    ]


def open_builder(
    uri: str,
    plan: Sequence[PlannedShard],
    *,
    codec: RowCodec = "exact",
    compression: Compression = "none",
) -> CacheWriter:
    """Create a cache of simulated targets."""
    return create_or_open_builder(
        uri,
        identity={"teacher": {"weights": "simulated"}},
        plan=plan,
        provenance={},
        head=None,
        codec=codec,
        compression=compression,
    )


def commit(writer: CacheWriter, shard_id: str, samples: Sequence[TeacherTargets]) -> CommitRecord:
    """Write and commit one shard."""
    digests = {sample.sample_id: digest_of(sample.sample_id) for sample in samples}
    return writer.commit_shard(shard_id, samples, sample_digests=digests, skipped=(), provenance={})


def build_cache(
    uri: str,
    samples: Sequence[TeacherTargets],
    *,
    per_shard: int,
    codec: RowCodec = "exact",
    compression: Compression = "none",
) -> None:
    """Write a complete cache."""
    plan = plan_of([sample.sample_id for sample in samples], per_shard=per_shard)
    writer = open_builder(uri, plan, codec=codec, compression=compression)
    for number, shard in enumerate(plan):
        commit(writer, shard.shard_id, samples[number * per_shard : (number + 1) * per_shard])


@dataclass(frozen=True, kw_only=True)
class ByteRange:
    """Where the rows of one sample and array lie."""

    path: Path
    offset: int
    length: int
    """Checksums between chunks included."""


def byte_ranges(folder: Path) -> dict[str, list[ByteRange]]:
    """Return by sample id what a reader of all tiers reads, one range per array."""
    store = open_store(str(folder))
    manifest = read_manifest(store)
    records = read_standing(store, read_plan(store, manifest), fingerprint=manifest.fingerprint)
    found: dict[str, list[ByteRange]] = {}
    for record, _ in records.values():
        assert record.layout is not None
        for name, field in stored_fields(record.layout).items():
            offsets = record.rows.offsets[field.axis]
            geometry = ArrayGeometry(field=field, num_rows=int(offsets[-1]), compression=record.layout.compression)
            path = folder / record.folder / object_name(name, geometry)
            for sample_id, first, stop in zip(record.sample_ids, offsets[:-1], offsets[1:], strict=True):
                if name != "spans" and stop > first:
                    start, end = (_position(geometry, int(row)) for row in (first, stop))
                    found.setdefault(sample_id, []).append(ByteRange(path=path, offset=start, length=end - start))
    return found


def _position(geometry: ArrayGeometry, row: int) -> int:
    payload = row * geometry.field.row_bytes
    return payload + payload // geometry.chunk_bytes * CRC_BYTES
