"""Pure losses of distillation: nats per token, unreduced, softmax applied inside.

Losses through a head that is too wide for dense logits are in `distill.chunked_losses`, those across tokenizers in
`distill.uld`; both are importable from here.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.chunked_losses import (
    DEFAULT_CHUNKS,
    ChunkSizes,
    TokenLosses,
    WeightedTokenLosses,
    accumulation_dtype,
    linear_ce,
    linear_ce_kl,
    linear_divergence,
    weighted_ce_kl,
)
from distill.divergences import FORWARD_KL, Divergence
from distill.linear_head import LinearHead
from distill.uld import topk_uld_loss, uld_loss

__all__ = [
    "DEFAULT_CHUNKS",
    "FORWARD_KL",
    "ChunkSizes",
    "Divergence",
    "LinearHead",
    "TokenLosses",
    "WeightedTokenLosses",
    "feature_mse",
    "forward_kl",
    "jensen_shannon",
    "linear_ce",
    "linear_ce_kl",
    "linear_divergence",
    "reverse_kl",
    "topk_forward_kl",
    "topk_uld_loss",
    "uld_loss",
    "weighted_ce_kl",
]


def forward_kl(
    student_logits: Float[Tensor, "*tokens vocab"], teacher_logits: Float[Tensor, "*tokens vocab"]
) -> Float[Tensor, "*tokens"]:
    """Return ``KL(teacher || student) = sum_v p_teacher (log p_teacher - log p_student)``.

    Why: the paper's direction; it punishes the student where it misses mass that the teacher has (mode covering).
    Source: arXiv 1503.02531; arXiv 2506.15681 at temperature 1.
    """
    return _kl(_log_softmax(teacher_logits), _log_softmax(student_logits))


def reverse_kl(
    student_logits: Float[Tensor, "*tokens vocab"], teacher_logits: Float[Tensor, "*tokens vocab"]
) -> Float[Tensor, "*tokens"]:
    """Return ``KL(student || teacher) = sum_v p_student (log p_student - log p_teacher)``.

    Why: a student too small for all modes should not spread over what the teacher rules out (mode seeking).
    Source: MiniLLM, arXiv 2306.08543.
    """
    return _kl(_log_softmax(student_logits), _log_softmax(teacher_logits))


def jensen_shannon(
    student_logits: Float[Tensor, "*tokens vocab"],
    teacher_logits: Float[Tensor, "*tokens vocab"],
    *,
    beta: float = 0.5,
) -> Float[Tensor, "*tokens"]:
    """Return ``beta KL(teacher || m) + (1 - beta) KL(student || m)`` with ``m = beta teacher + (1 - beta) student``.

    Why: bounded (by ln 2 at ``beta=0.5``) and so calm on saturated teachers; between forward and reverse KL.
    Source: GKD, arXiv 2306.13649, equation 1.
    """
    if not 0 < beta < 1:
        raise ValueError(f"jensen_shannon needs 0 < beta < 1, found {beta}: use forward_kl or reverse_kl at the ends")
    # The floor changes nothing (exp(-1e4) is 0 in any precision) and keeps -inf - (-inf) out of the gradient.
    student, teacher = (_log_softmax(logits).clamp(min=-1e4) for logits in (student_logits, teacher_logits))
    mixture = torch.stack([teacher + math.log(beta), student + math.log1p(-beta)]).logsumexp(0)
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def topk_forward_kl(
    student_logits: Float[Tensor, "*tokens vocab"],
    topk_ids: Int[Tensor, "*tokens k"],
    topk_logprobs: Float[Tensor, "*tokens k"],
) -> Float[Tensor, "*tokens"]:
    """Return forward KL with the teacher's top-k entries and everything else as one bucket.

    Formula: ``sum_{i <= k} p_i (log p_i - log q_i) + p_rest (log p_rest - log q_rest)`` with teacher ``p``, student
    ``q``, ``p_rest = 1 - sum p_i`` and ``q_rest = 1 - sum q_i``; a lower bound of the full forward KL.
    Why: needs only tier L of the cache. Dropping the rest or renormalising would push the student's tail to zero.
    Source: arXiv 2503.16870 measures the bias of plain top-k targets; the bucket keeps the total mass right.
    """
    student = _log_softmax(student_logits)
    teacher = topk_logprobs.to(student.dtype)
    topk_student = student.gather(-1, topk_ids.long())
    if topk_ids.shape[-1] == student.shape[-1]:
        return _kl(teacher, topk_student)
    student_rest = student.scatter(-1, topk_ids.long(), -torch.inf).logsumexp(-1, keepdim=True)
    teacher_rest = (1 - teacher.exp().sum(-1, keepdim=True)).clamp(min=0).log()
    return _kl(torch.cat([teacher, teacher_rest], -1), torch.cat([topk_student, student_rest], -1))


def feature_mse(
    rows: Float[Tensor, "tokens hidden"], target_rows: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, " tokens"]:
    """Return ``mean_h (rows - target_rows)^2`` per token, in float32: squared feature units, not nats.

    Why: the weakest form of the regularisation term in the paper's ablation. Source: arXiv 2506.15681.
    """
    dtype = accumulation_dtype(rows.dtype)
    return (rows.to(dtype) - target_rows.to(dtype)).square().mean(-1)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(accumulation_dtype(logits.dtype)).log_softmax(-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum ``p (log p - log q)``; entries that p rules out count zero, also where q rules them out too."""
    p = log_p.exp()
    return (p * torch.where(p > 0, log_p - log_q, 0)).sum(-1)
