"""The losses of the comparison methods through the student's head, in chunks.

``sft`` is the distill and finetune stages without a teacher. ``kd`` adds to the student's own cross-entropy the
divergence from a teacher with the same tokenizer, ``uld`` a distance over spans aligned across tokenizers.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill.chunked_losses import linear_ce, linear_divergence
from distill.config import BaselineOptions
from distill.divergences import Divergence
from distill.head_logits import head_logits
from distill.linear_head import LinearHead
from distill.logit_targets import LogitTargets
from distill.sorted_distance import sorted_distance, topk_distance
from distill.uld import SpanTokens, span_scale

CHUNK_SPANS = 256


def kd_loss(
    rows: Float[Tensor, "tokens student_hidden"],
    *,
    head: LinearHead,
    targets: LogitTargets,
    teacher_head: LinearHead | None,
    options: BaselineOptions,
) -> Float[Tensor, " tokens"]:
    """Return the divergence of the student's predictions from the teacher's: nats per token.

    Formula: `Divergence` of ``softmax(H_s(rows) / T)`` from the teacher's softmax at the same temperature; from tier L
    the k highest entries and one for everything below them.
    Why: the classical baseline where teacher and student share a tokenizer.
    Source: arXiv 1503.02531 (forward), arXiv 2306.08543 (reverse), arXiv 2306.13649 (Jensen-Shannon).

    Heads padded to other heights beyond the common vocabulary are compared over the entries that both have.
    """
    divergence = Divergence(kind=options.divergence, beta=options.jensen_shannon_beta, temperature=options.temperature)
    if targets.rows is not None:
        assert teacher_head is not None
        shared = min(head.vocab_size, teacher_head.vocab_size)
        head, teacher_head = _first_entries(head, shared), _first_entries(teacher_head, shared)
    return linear_divergence(
        rows,
        teacher_rows=targets.rows,
        topk_ids=targets.topk_ids,
        topk_logprobs=targets.topk_logprobs,
        teacher_head=teacher_head,
        divergence=divergence,
        weight=head.weight,
        bias=head.bias,
        logit_scale=head.logit_scale,
        logit_softcap=head.logit_softcap,
    )


def uld_loss_of_rows(
    rows: Float[Tensor, "student_tokens student_hidden"],
    *,
    head: LinearHead,
    labels: Int[Tensor, " student_tokens"],
    targets: LogitTargets,
    teacher_head: LinearHead | None,
    options: BaselineOptions,
) -> Float[Tensor, " spans"]:
    """Return `aligned_uld_loss` of each span through the heads, its lower bound where the teacher is a top-k.

    Formula: as there; from tier L ``sum_{i <= k} |p_(i) - q_(i)| + |p_rest - q_rest|``.
    Why: the baseline for different tokenizers. Only the rows of spans have logits, ``CHUNK_SPANS`` of them at a time;
    the backward pass computes them again.
    Source: arXiv 2402.12030; spans as in GOLD (Hugging Face TRL); the tail bucket is ours.
    """
    assert targets.spans is not None
    head = _at_temperature(head, options.temperature)
    student, teacher = targets.spans.student, targets.spans.teacher
    scale = span_scale(_token_logprobs(rows, head, labels, student), student)
    base_rows = rows.index_select(0, student.base)
    if targets.rows is None:
        assert targets.topk_logprobs is not None
        assert targets.target_logprobs is not None
        teacher_scale = span_scale(targets.target_logprobs[teacher.others], teacher)
        topk = targets.topk_logprobs[teacher.base].exp() * teacher_scale[:, None]
        return _in_chunks(partial(_topk_chunk, head), base_rows, scale, topk, teacher_scale)
    assert teacher_head is not None
    teacher_head = _at_temperature(teacher_head, options.temperature)
    with torch.no_grad():
        logprobs = _token_logprobs(targets.rows, teacher_head, targets.labels, teacher)
        teacher_scale = span_scale(logprobs, teacher)
    teacher_rows = targets.rows.index_select(0, teacher.base)
    return _in_chunks(partial(_full_chunk, head, teacher_head), base_rows, scale, teacher_rows, teacher_scale)


def _full_chunk(
    head: LinearHead, teacher_head: LinearHead, rows: Tensor, scale: Tensor, teacher_rows: Tensor, teacher_scale: Tensor
) -> Float[Tensor, " spans"]:
    with torch.no_grad():
        teacher = _probabilities(teacher_rows, teacher_head) * teacher_scale[:, None]
    return sorted_distance(_probabilities(rows, head) * scale[:, None], teacher)


def _topk_chunk(
    head: LinearHead, rows: Tensor, scale: Tensor, topk: Tensor, teacher_scale: Tensor
) -> Float[Tensor, " spans"]:
    student = _probabilities(rows, head) * scale[:, None]
    return topk_distance(student, student_mass=scale, topk=topk, teacher_mass=teacher_scale)


def _in_chunks(chunk_loss: Callable[..., Tensor], *tensors: Tensor) -> Float[Tensor, " spans"]:
    chunks = zip(*(tensor.split(CHUNK_SPANS) for tensor in tensors), strict=True)
    return torch.cat([checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks])


def _probabilities(rows: Float[Tensor, "rows hidden"], head: LinearHead) -> Float[Tensor, "rows vocab"]:
    return head_logits(rows, head).softmax(-1)


def _token_logprobs(
    rows: Float[Tensor, "tokens hidden"], head: LinearHead, labels: Int[Tensor, " tokens"], tokens: SpanTokens
) -> Float[Tensor, " other_tokens"]:
    others = tokens.others
    return -linear_ce(
        rows.index_select(0, others),
        labels=labels.index_select(0, others),
        weight=head.weight,
        bias=head.bias,
        logit_scale=head.logit_scale,
        logit_softcap=head.logit_softcap,
    )


def _at_temperature(head: LinearHead, temperature: float) -> LinearHead:
    """Return the head whose logits are divided by the temperature, after the soft-cap."""
    softcap = None if head.logit_softcap is None else head.logit_softcap / temperature
    return dataclasses.replace(head, logit_scale=head.logit_scale / temperature, logit_softcap=softcap)


def _first_entries(head: LinearHead, number: int) -> LinearHead:
    if number == head.vocab_size:
        return head
    bias = None if head.bias is None else head.bias[:number]
    return dataclasses.replace(head, weight=head.weight[:number], bias=bias)
