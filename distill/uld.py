"""Universal logit distillation: what two models with different tokenizers can be compared by."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from distill.chunked_losses import accumulation_dtype


@dataclass(frozen=True, kw_only=True)
class AlignedRows:
    """Rows of two tokenisations that are compared with each other, position by position in each span."""

    student: Int[Tensor, " tokens"]
    teacher: Int[Tensor, " tokens"]


def uld_loss(
    student_logits: Float[Tensor, "tokens student_vocab"], teacher_logits: Float[Tensor, "tokens teacher_vocab"]
) -> Float[Tensor, " tokens"]:
    """Return the universal logit distillation loss: ``sum_i |p_(i) - q_(i)|`` over probabilities sorted downwards.

    The smaller vocabulary is padded with zeros. A distance in probability (0..2), not in nats.
    Why: the baseline for different tokenizers; ids never have to match, rows are paired by `align_spans`.
    Source: arXiv 2402.12030 (the Wasserstein-1 term).
    """
    student, teacher = (
        _log_softmax(logits).exp().sort(dim=-1, descending=True).values for logits in (student_logits, teacher_logits)
    )
    padding = student.shape[-1] - teacher.shape[-1]
    student, teacher = functional.pad(student, (0, max(-padding, 0))), functional.pad(teacher, (0, max(padding, 0)))
    return (student - teacher).abs().sum(-1)


def topk_uld_loss(
    student_logits: Float[Tensor, "tokens student_vocab"], topk_logprobs: Float[Tensor, "tokens k"]
) -> Float[Tensor, " tokens"]:
    """Return `uld_loss` from the teacher's top-k: ``sum_{i <= k} |p_(i) - q_(i)| + |p_rest - q_rest|``.

    A lower bound of the full loss. Why: needs only tier L of the cache. Source: arXiv 2402.12030, tail bucket ours.
    """
    probabilities = _log_softmax(student_logits).exp()
    k = min(topk_logprobs.shape[-1], probabilities.shape[-1])
    student = probabilities.topk(k, dim=-1).values
    teacher = topk_logprobs[..., :k].to(student.dtype).exp()
    return (student - teacher).abs().sum(-1) + (student.sum(-1) - teacher.sum(-1)).abs()


def align_spans(student_lengths: Sequence[int], teacher_lengths: Sequence[int]) -> AlignedRows:
    """Pair packed answer rows of both sides: the first ``min(student, teacher)`` rows of each span, in order.

    The truncation of arXiv 2402.12030, per assistant turn instead of per sample.
    """
    student, teacher, student_start, teacher_start = [torch.arange(0)], [torch.arange(0)], 0, 0
    for num_student, num_teacher in zip(student_lengths, teacher_lengths, strict=True):
        shared = torch.arange(min(num_student, num_teacher))
        student.append(student_start + shared)
        teacher.append(teacher_start + shared)
        student_start += num_student
        teacher_start += num_teacher
    return AlignedRows(student=torch.cat(student), teacher=torch.cat(teacher))


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(accumulation_dtype(logits.dtype)).log_softmax(-1)
