"""What the students of kd and uld are compared with: the teacher's predictions of its answer tokens, packed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.config import LogitSource
from distill.uld import AlignedSpans, align_spans
from recalibrator.joint_sequence import split_tier_a
from teacher_cache.schema import EncodedConversation, Span, TeacherTargets


@dataclass(frozen=True, kw_only=True)
class LogitNeeds:
    """Which of the targets a stage reads."""

    source: LogitSource
    with_spans: bool
    """Align the student's tokens with the teacher's; without it they must be the same."""


@dataclass(frozen=True, kw_only=True)
class LogitTargets:
    """The teacher's predictions of its answer tokens: samples, turns and tokens in order."""

    labels: Int[Tensor, " teacher_answer_tokens"]
    rows: Float[Tensor, "teacher_answer_tokens teacher_hidden"] | None = None
    """Rows that the teacher's head turns into the distributions; None where they come from tier L:"""
    topk_ids: Int[Tensor, "teacher_answer_tokens k"] | None = None
    topk_logprobs: Float[Tensor, "teacher_answer_tokens k"] | None = None
    target_logprobs: Float[Tensor, " teacher_answer_tokens"] | None = None
    spans: AlignedSpans | None = None
    span_weights: Float[Tensor, " spans"] | None = None
    """Weight of the sample that each span is from."""


def pack_logit_targets(
    *,
    encoded: Sequence[EncodedConversation],
    targets: Sequence[TeacherTargets],
    weights: Sequence[float],
    needs: LogitNeeds,
) -> LogitTargets:
    """Pack what a micro-batch needs; one entry per sample in every sequence."""
    labels = torch.cat([target.token_ids[start:stop] for target in targets for start, stop in target.spans]).long()
    with_topk = needs.source == "topk"
    spans = span_weights = None
    if needs.with_spans:
        spans = _align(encoded, targets)
        tokens = torch.tensor([sum(_lengths(target.spans)) for target in targets])
        span_weights = torch.tensor(weights).repeat_interleave(tokens)[spans.teacher.base]
    return LogitTargets(
        labels=labels,
        rows=None if with_topk else _predicting_rows(targets),
        topk_ids=torch.cat([_stored(t.topk_ids) for t in targets]).long() if with_topk else None,
        topk_logprobs=torch.cat([_stored(t.topk_logprobs) for t in targets]) if with_topk else None,
        target_logprobs=torch.cat([_stored(t.target_logprobs) for t in targets]) if with_topk else None,
        spans=spans,
        span_weights=span_weights,
    )


def _predicting_rows(targets: Sequence[TeacherTargets]) -> Float[Tensor, "teacher_answer_tokens teacher_hidden"]:
    tier_a = torch.cat([target.hidden_states for target in targets])
    return tier_a[split_tier_a([length for target in targets for length in _lengths(target.spans)]).predicting]


def _align(encoded: Sequence[EncodedConversation], targets: Sequence[TeacherTargets]) -> AlignedSpans:
    return align_spans(
        student_ends=np.concatenate([one.answer_byte_ends for one in encoded]),
        teacher_ends=torch.cat([_stored(target.answer_byte_ends) for target in targets]).numpy(),
        student_lengths=[length for one in encoded for length in _lengths(one.spans)],
        teacher_lengths=[length for target in targets for length in _lengths(target.spans)],
    )


def _lengths(spans: Sequence[Span]) -> list[int]:
    return [stop - start for start, stop in spans]


def _stored(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
