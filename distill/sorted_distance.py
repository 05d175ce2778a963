"""Distances between distributions over different vocabularies: by their values in descending order."""

from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.linear_head import slices

SPANS_AT_ONCE: Final = 64
"""Spans whose probabilities are sorted at a time: the work space does not grow with their number."""


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


class _SortedDistance(torch.autograd.Function):
    """Keeps one byte per student value: the gradient is the sign of the difference at the value's rank."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        signs = torch.empty(student.shape, dtype=torch.int8, device=student.device)
        losses = student.new_empty(len(student))
        for spans in slices(len(student), SPANS_AT_ONCE):
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
