"""Universal logit distillation: what two models with different tokenizers can be compared by.

Two tokenisations of one text agree at some of their token ends. Between two such ends lies an *aligned span*: a few
tokens on either side that spell the same bytes. The prediction of a span is one distribution per side, and two of
them are compared by their probabilities in descending order, so that ids never have to match.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.linear_head import accumulation_dtype, slices

Base = Literal["last", "first"]

LEAST_LOGPROB = math.log(1e-8)
"""Floor of a token's log-probability where it scales its span: one impossible token must not blank the others."""

_SORTED_SPANS = 64
"""Spans that are sorted at a time: the work space does not grow with their number."""


@dataclass(frozen=True, kw_only=True)
class SpanTokens:
    """Where the aligned spans are in the packed answer tokens of one side."""

    base: Int[Tensor, " spans"]
    """The token whose distribution stands for the span."""
    others: Int[Tensor, " other_tokens"]
    """The other tokens of all spans: their probabilities scale the distribution."""
    span_of_other: Int[Tensor, " other_tokens"]


@dataclass(frozen=True, kw_only=True)
class AlignedSpans:
    """The aligned spans of two tokenisations."""

    student: SpanTokens
    teacher: SpanTokens


def align_spans(
    *,
    student_ends: Int[np.ndarray, " student_answer_tokens"],
    teacher_ends: Int[np.ndarray, " teacher_answer_tokens"],
    student_lengths: Sequence[int],
    teacher_lengths: Sequence[int],
    base: Base = "last",
) -> AlignedSpans:
    """Cut packed answers into spans at the byte ends that both tokenisations share.

    The k-th token of one side that ends at a byte closes a span with the k-th of the other side that ends there, so
    tokens without bytes of their own (the end of a turn) pair with each other. What is left over at the end of a turn
    on one side has nothing to be compared with and belongs to no span. Time is linear in tokens, up to a sort of
    sorted numbers; no loop runs over tokens.

    Args:
        student_ends: Byte in the answer's text where each student token ends, turns one after the other.
        teacher_ends: The same for the teacher.
        student_lengths: Student tokens of each answer.
        teacher_lengths: Teacher tokens of each answer.
        base: The token whose distribution stands for the span. The last one, given the tokens before it, is the chain
            rule: ``p(t_1) ... p(t_{n-1}) p(. | t_1 .. t_{n-1})``. The first one is the other choice of TRL.

    Raises:
        ValueError: The two sides have other numbers of answers, or an answer of other byte lengths.
    """
    student_turn, teacher_turn = _turns(student_lengths), _turns(teacher_lengths)
    _check_same_text(student_ends, teacher_ends, student_lengths, teacher_lengths)
    width = int(max(student_ends.max(initial=0), teacher_ends.max(initial=0))) + 1
    repeats = len(student_ends) + len(teacher_ends)
    student_keys = _keys(student_turn * width + student_ends, repeats=repeats)
    teacher_keys = _keys(teacher_turn * width + teacher_ends, repeats=repeats)
    _, student_last, teacher_last = np.intersect1d(student_keys, teacher_keys, assume_unique=True, return_indices=True)
    return AlignedSpans(
        student=_span_tokens(student_last, turn=student_turn, base=base),
        teacher=_span_tokens(teacher_last, turn=teacher_turn, base=base),
    )


def aligned_uld_loss(
    student_logits: Float[Tensor, "student_tokens student_vocab"],
    teacher_logits: Float[Tensor, "teacher_tokens teacher_vocab"],
    *,
    student_ids: Int[Tensor, " student_tokens"],
    teacher_ids: Int[Tensor, " teacher_tokens"],
    spans: AlignedSpans,
    temperature: float = 1.0,
) -> Float[Tensor, " spans"]:
    """Return the universal logit distillation loss of each aligned span; row t of the logits predicts token t.

    Formula: ``sum_i |p_(i) - q_(i)|`` over descending values of ``q = q(. | base) prod_others q(token)`` and the
    teacher's ``p`` of the same form; softmax of ``logits / temperature`` inside. A distance in probability, not nats.
    Why: truncating both sides to the shorter one compares predictions of different text wherever tokens differ.
    Source: arXiv 2402.12030 for the distance; GOLD (Hugging Face TRL) for the spans, with equal values and gradients.

    The gradient reaches the student only.
    """
    student = merge_spans(student_logits / temperature, student_ids, spans.student)
    with torch.no_grad():
        teacher = merge_spans(teacher_logits / temperature, teacher_ids, spans.teacher)
    return sorted_distance(student, teacher)


def merge_spans(
    logits: Float[Tensor, "tokens vocab"], token_ids: Int[Tensor, " tokens"], tokens: SpanTokens
) -> Float[Tensor, "spans vocab"]:
    """Return one distribution per span, scaled by the probability of the span's other tokens."""
    others = _log_softmax(logits.index_select(0, tokens.others))
    scale = span_scale(others.gather(1, token_ids[tokens.others].long()[:, None])[:, 0], tokens)
    base = logits if len(tokens.base) == len(logits) else logits.index_select(0, tokens.base)
    probabilities = base.to(accumulation_dtype(base.dtype)).softmax(-1)
    return probabilities * scale[:, None] if len(tokens.others) else probabilities


def span_scale(logprobs: Float[Tensor, " other_tokens"], tokens: SpanTokens) -> Float[Tensor, " spans"]:
    """Return the product of the probabilities of each span's other tokens, 1 where there are none."""
    zeros = logprobs.new_zeros(len(tokens.base))
    return zeros.index_add(0, tokens.span_of_other, logprobs.clamp(min=LEAST_LOGPROB)).exp()


def sorted_distance(
    student: Float[Tensor, "spans student_vocab"], teacher: Float[Tensor, "spans teacher_vocab"]
) -> Float[Tensor, " spans"]:
    """Return ``sum_i |p_(i) - q_(i)|`` over descending values, the narrower side padded with zeros.

    Values must not be negative. The gradient reaches the student only.
    """
    return _SortedDistance.apply(student, teacher.detach())


def topk_distance(
    student: Float[Tensor, "spans student_vocab"],
    *,
    student_mass: Float[Tensor, " spans"],
    topk: Float[Tensor, "spans k"],
    teacher_mass: Float[Tensor, " spans"],
) -> Float[Tensor, " spans"]:
    """Return a lower bound of `sorted_distance` from the teacher's k highest values and its total mass.

    Formula: ``sum_{i <= k} |p_(i) - q_(i)| + |p_rest - q_rest|``, rest being the mass below rank k.
    """
    k = min(topk.shape[-1], student.shape[-1])
    own, theirs = student.topk(k, dim=-1).values, topk[..., :k]
    rest = (student_mass - own.sum(-1)) - (teacher_mass - theirs.sum(-1))
    return (own - theirs).abs().sum(-1) + rest.abs()


def uld_loss(
    student_logits: Float[Tensor, "tokens student_vocab"], teacher_logits: Float[Tensor, "tokens teacher_vocab"]
) -> Float[Tensor, " tokens"]:
    """Return the universal logit distillation loss of rows that are paired already.

    Formula: ``sum_i |p_(i) - q_(i)|`` over probabilities in descending order, the smaller vocabulary padded with
    zeros; softmax inside. A distance in probability (0..2), not in nats.
    Why: the baseline for different tokenizers; ids never have to match. `aligned_uld_loss` pairs spans of tokens.
    Source: arXiv 2402.12030 (the Wasserstein-1 term).

    The gradient reaches the student only.
    """
    return sorted_distance(_log_softmax(student_logits).exp(), _log_softmax(teacher_logits).exp())


def topk_uld_loss(
    student_logits: Float[Tensor, "tokens student_vocab"], topk_logprobs: Float[Tensor, "tokens k"]
) -> Float[Tensor, " tokens"]:
    """Return `uld_loss` from the teacher's top-k: ``sum_{i <= k} |p_(i) - q_(i)| + |p_rest - q_rest|``.

    A lower bound of the full loss. Why: needs only tier L of the cache. Source: arXiv 2402.12030, tail bucket ours.
    """
    probabilities = _log_softmax(student_logits).exp()
    ones = probabilities.new_ones(len(probabilities))
    topk = topk_logprobs.to(probabilities.dtype).exp()
    return topk_distance(probabilities, student_mass=ones, topk=topk, teacher_mass=ones)


class _SortedDistance(torch.autograd.Function):
    """Keeps one byte per student value: the gradient is the sign of the difference at the value's rank."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        signs = torch.empty(student.shape, dtype=torch.int8, device=student.device)
        losses = student.new_empty(len(student))
        for spans in slices(len(student), _SORTED_SPANS):
            losses[spans] = _distances(student[spans], teacher[spans], signs=signs[spans])
        ctx.save_for_backward(signs)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        (signs,) = ctx.saved_tensors
        return signs * grad_loss[:, None], None


def _distances(
    student: Float[Tensor, "spans student_vocab"],
    teacher: Float[Tensor, "spans teacher_vocab"],
    *,
    signs: Int[Tensor, "spans student_vocab"],
) -> Float[Tensor, " spans"]:
    """Return the distances, and write on which side of the teacher's each student value is."""
    values, index = sort_descending(student)
    teacher_values = _values_descending(teacher)
    shared = min(teacher.shape[-1], student.shape[-1])
    difference = values[:, :shared] - teacher_values[:, :shared]
    # what the narrower side lacks counts as zeros on that side
    sides = torch.ones_like(values, dtype=torch.int8)
    sides[:, :shared] = difference.sign()
    signs.scatter_(-1, index, sides)
    rest = values[:, shared:] if values.shape[-1] > shared else teacher_values[:, shared:]
    return difference.abs_().sum(-1) + rest.sum(-1)


def sort_descending(values: Float[Tensor, "rows width"]) -> tuple[Tensor, Int[Tensor, "rows width"]]:
    """Return non-negative values of each row in descending order, and where they were.

    On a CPU float32 values are sorted as 64-bit integers, bits of the value above its place, with numpy's vectorised
    sort: the bits of non-negative floats order as the floats do.
    """
    if values.device.type != "cpu" or values.dtype != torch.float32:
        return torch.sort(values, dim=-1, descending=True)
    keys = np.empty(values.shape, dtype="<i8")
    halves = keys.view("<i4").reshape(*values.shape, 2)
    # complemented, so that ascending keys are descending values
    np.invert(values.detach().contiguous().numpy().view("<i4"), out=halves[..., 1])
    halves[..., 0] = np.arange(values.shape[-1], dtype="<i4")
    keys.sort(axis=-1)
    found = np.invert(halves[..., 1]).view("<f4")
    return torch.from_numpy(found), torch.from_numpy(halves[..., 0].astype(np.int64))


def _values_descending(values: Tensor) -> Tensor:
    if values.device.type != "cpu" or values.dtype != torch.float32:
        return torch.sort(values, dim=-1, descending=True).values
    negated = values.neg()
    negated.numpy().sort(axis=-1)
    return negated.neg_()


def _turns(lengths: Sequence[int]) -> Int[np.ndarray, " tokens"]:
    return np.repeat(np.arange(len(lengths)), lengths)


def _check_same_text(
    student_ends: np.ndarray, teacher_ends: np.ndarray, student_lengths: Sequence[int], teacher_lengths: Sequence[int]
) -> None:
    student = student_ends[np.cumsum(student_lengths, dtype=np.int64) - 1].tolist()
    teacher = teacher_ends[np.cumsum(teacher_lengths, dtype=np.int64) - 1].tolist()
    if student != teacher:
        raise ValueError(
            f"cannot align answers of different texts: they end at bytes {student} for the student, {teacher} for the "
            "teacher. Expected the same answers in the same order on both sides"
        )


def _keys(ends: Int[np.ndarray, " tokens"], *, repeats: int) -> Int[np.ndarray, " tokens"]:
    """Tell the first, second, ... token that ends at the same byte from each other."""
    return ends.astype(np.int64) * repeats + np.arange(len(ends)) - np.searchsorted(ends, ends)


def _span_tokens(last: Int[np.ndarray, " spans"], *, turn: Int[np.ndarray, " tokens"], base: Base) -> SpanTokens:
    """Describe the spans that end with ``last``, each beginning where the one before it, or its turn, ends."""
    tokens = np.arange(len(turn))
    span = np.searchsorted(last, tokens)
    inside = span < len(last)
    inside[inside] = turn[last[span[inside]]] == turn[inside]
    first = tokens[inside][np.searchsorted(span[inside], np.arange(len(last)))]
    chosen = last if base == "last" else first
    inside[chosen] = False
    return SpanTokens(
        base=torch.from_numpy(chosen),
        others=torch.from_numpy(tokens[inside]),
        span_of_other=torch.from_numpy(span[inside]),
    )


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(accumulation_dtype(logits.dtype)).log_softmax(-1)
