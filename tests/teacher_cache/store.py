"""Random targets and small caches for the storage tests."""

import hashlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from teacher_cache.ledger import CommitRecord
from teacher_cache.plan import PlannedShard
from teacher_cache.schema import Span, TeacherHead, TeacherTargets, predicting_rows, question_row_mask, tier_a_rows
from teacher_cache.writer import CacheWriter, create_or_open_builder

HIDDEN, TOPK, VOCAB = 8, 4, 50
IDENTITY: dict[str, Any] = {
    "teacher": {"weights": "3f2a", "dtype": "bfloat16"},
    "processing": {"chat_template": "77", "max_length": 4096},
    "targets": {"topk": TOPK, "question_fraction": 0.5},
    "tap": "final-norm",
}
TURNS = ((Span(3, 7), Span(9, 10)), (Span(1, 2),), (Span(5, 20),))


def make_targets(
    sample_id: str,
    *,
    spans: Sequence[Span] = (Span(3, 7), Span(9, 10)),
    num_tokens: int = 24,
    dtype: torch.dtype = torch.bfloat16,
    hidden: int = HIDDEN,
    questions: bool = True,
    seed: int = 0,
) -> TeacherTargets:
    generator = torch.Generator().manual_seed(seed)
    spans = tuple(spans)
    answer_tokens = len(predicting_rows(spans))
    logits = torch.randn(answer_tokens, VOCAB, generator=generator)
    top = torch.log_softmax(logits, dim=-1).topk(TOPK, dim=-1)
    question_rows = int(question_row_mask(spans, num_tokens=num_tokens).sum())
    return TeacherTargets(
        sample_id=sample_id,
        token_ids=torch.randint(0, VOCAB, (num_tokens,), generator=generator),
        spans=spans,
        hidden_states=torch.randn(len(tier_a_rows(spans)), hidden, generator=generator).to(dtype),
        question_hidden_states=torch.randn(question_rows, hidden, generator=generator).to(dtype) if questions else None,
        topk_ids=top.indices,
        topk_logprobs=top.values,
        logsumexp=logits.logsumexp(dim=-1),
        target_logprobs=top.values[:, 1].clone(),
        answer_byte_ends=torch.cat([torch.arange(span.stop - span.start) * 3 for span in spans]),
    )


def make_samples(num_samples: int, **kwargs: Any) -> list[TeacherTargets]:
    return [
        make_targets(f"sample-{i}", spans=TURNS[i % 3], num_tokens=24 + i, questions=i % 2 == 0, seed=i, **kwargs)
        for i in range(num_samples)
    ]


def digest_of(sample_id: str) -> str:
    return hashlib.sha256(sample_id.encode()).hexdigest()


def make_plan(samples: Sequence[TeacherTargets], *, per_shard: int) -> list[PlannedShard]:
    ids = [sample.sample_id for sample in samples]
    return [
        PlannedShard(
            shard_id=f"{start // per_shard:05d}",
            sample_ids=tuple(ids[start : start + per_shard]),
            sample_digests=tuple(digest_of(sample_id) for sample_id in ids[start : start + per_shard]),
        )
        for start in range(0, len(ids), per_shard)
    ]


def make_head() -> TeacherHead:
    weight = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(7)).bfloat16()
    return TeacherHead(weight=weight, logit_scale=0.0625, logit_softcap=30.0)


def open_builder(root: Path, samples: Sequence[TeacherTargets], *, per_shard: int = 2, **kwargs: Any) -> CacheWriter:
    arguments: dict[str, Any] = {
        "identity": IDENTITY,
        "provenance": {"release": "0.1.0"},
        "head": make_head(),
        **kwargs,
    }
    return create_or_open_builder(str(root), plan=make_plan(samples, per_shard=per_shard), **arguments)


def commit(writer: CacheWriter, shard: PlannedShard, samples: Sequence[TeacherTargets]) -> CommitRecord:
    chosen = [sample for sample in samples if sample.sample_id in shard.sample_ids]
    digests = {sample.sample_id: digest_of(sample.sample_id) for sample in chosen}
    return writer.commit_shard(
        shard.shard_id, chosen, sample_digests=digests, skipped=(), provenance={"engine": "test"}
    )


def build(root: Path, samples: Sequence[TeacherTargets], *, per_shard: int = 2, **kwargs: Any) -> CacheWriter:
    writer = open_builder(root, samples, per_shard=per_shard, **kwargs)
    for shard in writer.missing_shards():
        commit(writer, shard, samples)
    return writer


def assert_same(left: TeacherTargets, right: TeacherTargets) -> None:
    for field in fields(TeacherTargets):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype, field.name
            assert a.shape == b.shape, field.name
            bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
            assert torch.equal(a.view(bits), b.view(bits)), field.name
        else:
            assert a == b, field.name


def flip_bit(path: Path, *, byte: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)
