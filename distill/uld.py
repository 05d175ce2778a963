"""Universal logit distillation: what two models with different tokenizers can be compared by.

Two tokenisations of one text agree at some of their token ends. Between two such ends lies an *aligned span*: a few
tokens on either side that spell the same bytes. The prediction of a span is one distribution per side, and two of
them are compared by their probabilities in descending order, so that ids never have to match.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.linear_head import accumulation_dtype, slices
from distill.sorted_distance import SPANS_AT_ONCE, sorted_distance, topk_distance

Base = Literal["last", "first"]

LEAST_LOGPROB = math.log(1e-8)
"""Floor of a token's log-probability where it scales its span: one impossible token must not blank the others."""


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
    losses = []
    for student, teacher in zip(
        _blocks(student_logits, student_ids, spans.student),
        _blocks(teacher_logits.detach(), teacher_ids, spans.teacher),
        strict=True,
    ):
        own, theirs = (
            merge_spans(block.logits / temperature, block.token_ids, block.tokens) for block in (student, teacher)
        )
        losses.append(sorted_distance(own, theirs))
    return torch.cat(losses) if losses else student_logits.new_zeros(0, dtype=accumulation_dtype(student_logits.dtype))


class _Block(NamedTuple):
    logits: Float[Tensor, "tokens vocab"]
    token_ids: Int[Tensor, " tokens"]
    tokens: SpanTokens


def _blocks(
    logits: Float[Tensor, "tokens vocab"], token_ids: Int[Tensor, " tokens"], tokens: SpanTokens
) -> Iterator[_Block]:
    """Yield a few spans at a time, on the logits' device, so that the work space does not grow with their number."""
    ends = tokens.base.scatter_reduce(0, tokens.span_of_other, tokens.others, "amax") + 1
    parts = list(slices(len(ends), SPANS_AT_ONCE))
    stops = [int(ends[part.stop - 1]) for part in parts]
    starts = [0, *stops]
    # in one split, whose backward pass puts the gradients side by side instead of adding up one per block
    sizes = [stop - start for start, stop in pairwise(starts)] + [len(logits) - starts[-1]]
    pieces = zip(logits.split(sizes), token_ids.split(sizes), strict=True)
    for part, start, (own_logits, own_ids) in zip(parts, starts, pieces, strict=False):
        bounds = tokens.span_of_other.new_tensor([part.start, part.stop])
        others = slice(*torch.searchsorted(tokens.span_of_other, bounds).tolist())
        yield _Block(
            logits=own_logits,
            token_ids=own_ids,
            tokens=SpanTokens(
                base=(tokens.base[part] - start).to(logits.device),
                others=(tokens.others[others] - start).to(logits.device),
                span_of_other=(tokens.span_of_other[others] - part.start).to(logits.device),
            ),
        )


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
