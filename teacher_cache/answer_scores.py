"""What a teacher says about the answer tokens (tier L), and the byte form in which an engine returns it."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from teacher_cache.schema import Span, question_row_mask, tier_a_rows


@dataclass(frozen=True, kw_only=True)
class AnswerScores:
    """Tier L of one or more samples, one row per answer token; logs are natural, values float32."""

    topk_ids: Int[Tensor, "answer_tokens k"]
    topk_logprobs: Float[Tensor, "answer_tokens k"]
    logsumexp: Float[Tensor, " answer_tokens"]
    target_logprobs: Float[Tensor, " answer_tokens"]

    def split(self, sizes: list[int]) -> list["AnswerScores"]:
        """Return the scores of consecutive samples of the given numbers of answer tokens."""
        parts = zip(
            self.topk_ids.split(sizes),
            self.topk_logprobs.split(sizes),
            self.logsumexp.split(sizes),
            self.target_logprobs.split(sizes),
            strict=True,
        )
        return [AnswerScores(topk_ids=i, topk_logprobs=p, logsumexp=s, target_logprobs=t) for i, p, s, t in parts]


def score_logits(
    logits: Float[Tensor, "answer_tokens vocab"], *, target_ids: Int[Tensor, " answer_tokens"], topk: int
) -> AnswerScores:
    """Reduce the logits that predict the answer tokens to tier L; softmax is over the whole vocabulary, in float32."""
    logits = logits.float()
    logsumexp = logits.logsumexp(dim=-1)
    values, ids = logits.topk(topk, dim=-1)
    targets = logits.gather(-1, target_ids.long()[:, None])[:, 0]
    return AnswerScores(
        topk_ids=ids.to(torch.int32),
        topk_logprobs=values - logsumexp[:, None],
        logsumexp=logsumexp,
        target_logprobs=targets - logsumexp,
    )


def join_scores(parts: list[AnswerScores]) -> AnswerScores:
    """Return the scores of all parts, in order."""
    return AnswerScores(
        topk_ids=torch.cat([part.topk_ids for part in parts]),
        topk_logprobs=torch.cat([part.topk_logprobs for part in parts]),
        logsumexp=torch.cat([part.logsumexp for part in parts]),
        target_logprobs=torch.cat([part.target_logprobs for part in parts]),
    )


def stored_rows(spans: tuple[Span, ...], *, num_tokens: int, with_question: bool) -> Int[np.ndarray, " rows"]:
    """Return the token positions of the rows that an engine returns: tier A, then tier Q where it is wanted."""
    positions = tier_a_rows(spans)
    if not with_question:
        return positions
    return np.concatenate([positions, np.flatnonzero(question_row_mask(spans, num_tokens=num_tokens))])


def pack(rows: Float[Tensor, "rows hidden"], scores: AnswerScores) -> UInt8[Tensor, " bytes"]:
    """Return the raw bytes of hidden rows (bit for bit in their dtype), then of the scores."""
    parts = (rows, scores.topk_ids, scores.topk_logprobs, scores.logsumexp, scores.target_logprobs)
    return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])


def unpack(
    packed: UInt8[Tensor, " bytes"], *, num_rows: int, hidden_size: int, dtype: torch.dtype, num_answers: int, topk: int
) -> tuple[Float[Tensor, "rows hidden"], AnswerScores]:
    """Undo ``pack``.

    Raises:
        ValueError: The bytes are not as many as the sizes say.
    """
    shapes = [
        ((num_rows, hidden_size), dtype),
        ((num_answers, topk), torch.int32),
        ((num_answers, topk), torch.float32),
        ((num_answers,), torch.float32),
        ((num_answers,), torch.float32),
    ]
    sizes = [torch.Size(shape).numel() * kind.itemsize for shape, kind in shapes]
    if packed.numel() != sum(sizes):
        raise ValueError(f"expected {sum(sizes)} bytes of targets, found {packed.numel()}")
    # each part starts in memory of its own: a view at an odd offset cannot change its element type
    parts = [
        part.clone().view(kind).view(shape) for part, (shape, kind) in zip(packed.split(sizes), shapes, strict=True)
    ]
    rows, ids, logprobs, logsumexp, targets = parts
    return rows, AnswerScores(topk_ids=ids, topk_logprobs=logprobs, logsumexp=logsumexp, target_logprobs=targets)
