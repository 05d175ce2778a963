"""The autograd functions of the losses through a head: gradients made ahead, exact for any incoming weight.

The gradient to the rows is made in the forward pass, while the logits exist, and is scaled by what comes in from above:
each token's gradient is linear in its own incoming weight. Where two terms come in with another proportion than
foreseen, or the head is trained too, the logits are computed again; a sum whose weights are given never is.
"""

import importlib.util
import logging
import os
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.linear_head import LinearHead, accumulation_dtype, matmul_into
from distill.logit_blocks import BlockLosses, ChunkSizes, Scratch, block_losses, rows_gradient
from distill.teacher_terms import Targets, TermWeights

logger = logging.getLogger(__name__)
COMPILERS = ("gcc", "clang", "cc")
"""Any of which Triton takes for the launchers of its kernels, where CC names none."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that is not a tensor."""

    logit_scale: float
    logit_softcap: float | None
    divergence_weight: float
    chunks: ChunkSizes

    def head(self, weight: Tensor, bias: Tensor | None) -> LinearHead:
        """Return the head outside of any graph."""
        return LinearHead(
            weight=weight, bias=bias, logit_scale=self.logit_scale, logit_softcap=self.logit_softcap
        ).detached()


class LinearLosses(torch.autograd.Function):
    """CE, divergence or both. Saves the inputs and one gradient row per token."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Targets, settings: Settings
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return CE and divergence of each token; None where not asked for."""
        ctx.set_materialize_grads(False)
        ctx.targets, ctx.settings = targets, settings
        trains_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        weights = None
        if ctx.needs_input_grad[0] and not trains_head:
            ones = rows.new_ones(rows.shape[0], dtype=accumulation_dtype(rows.dtype))
            weights = TermWeights(ones, ones * settings.divergence_weight)
        done = _run(rows, settings.head(weight, bias), targets, settings.chunks, weights=weights)
        ctx.save_for_backward(rows, weight, bias, done.grad_rows)
        return done.ce, done.divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ce: Tensor | None, grad_divergence: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of rows, weight and bias."""
        rows, weight, bias, grad_rows = ctx.saved_tensors
        targets, settings = ctx.targets, ctx.settings
        if grad_ce is None and grad_divergence is None:
            return (None,) * 5
        weights = _incoming(grad_ce, grad_divergence)
        head = settings.head(weight, bias)
        if grad_rows is None:
            done = _run(rows, head, targets, settings.chunks, weights=weights, needs=ctx.needs_input_grad[:3])
            return done.grad_rows, done.grad_weight, done.grad_bias, None, None
        scale = weights.divergence if targets.labels is None else weights.ce
        grad_rows = grad_rows * scale[:, None]
        if targets.labels is not None and targets.divergence is not None:
            other = _weighted_otherwise(weights, settings.divergence_weight)
            if other is not None and len(other):
                part = TermWeights(weights.ce[other], weights.divergence[other])
                done = _run(rows[other], head, targets.take(other), settings.chunks, weights=part)
                grad_rows[other] = done.grad_rows
        return grad_rows.to(rows.dtype), None, None, None, None


class WeightedLosses(torch.autograd.Function):
    """The weighted sum of CE and divergence, and both without a gradient. Saves one gradient row per token."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        head: LinearHead,
        targets: Targets,
        term_weights: tuple[float, float],
        chunks: ChunkSizes,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sum, CE and divergence of each token."""
        ctx.set_materialize_grads(False)
        weights = None
        if ctx.needs_input_grad[0]:
            ones = rows.new_ones(rows.shape[0], dtype=accumulation_dtype(rows.dtype))
            weights = TermWeights(*(ones * weight for weight in term_weights))
        ce, divergence, grad_rows, *_ = _run(rows, head.detached(), targets, chunks, weights=weights)
        assert ce is not None
        assert divergence is not None
        ctx.save_for_backward(grad_rows)
        ctx.rows_dtype = rows.dtype
        ctx.mark_non_differentiable(ce, divergence)
        return term_weights[0] * ce + term_weights[1] * divergence, ce, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradient of the rows."""
        (grad_rows,) = ctx.saved_tensors
        grad_rows = None if grad_loss is None else (grad_rows * grad_loss[:, None]).to(ctx.rows_dtype)
        return grad_rows, None, None, None, None


class _Run(NamedTuple):
    ce: Tensor | None
    divergence: Tensor | None
    grad_rows: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None


def _run(
    rows: Tensor,
    head: LinearHead,
    targets: Targets,
    chunks: ChunkSizes,
    *,
    weights: TermWeights | None,
    needs: tuple[bool, bool, bool] = (True, False, False),
) -> _Run:
    """Go through all blocks; the gradients are those of the weighted sum of all losses."""
    dtype = accumulation_dtype(rows.dtype)
    ce = None if targets.labels is None else rows.new_empty(rows.shape[0], dtype=dtype)
    divergence = None if targets.divergence is None else rows.new_empty(rows.shape[0], dtype=dtype)
    # the first block writes and the others add: one onto zeros would first make a whole product beside them
    make = torch.empty_like if rows.shape[0] else torch.zeros_like
    sums = [
        make(like, dtype=dtype) if weights is not None and needed and like is not None else None
        for needed, like in zip(needs, (rows, head.weight, head.bias), strict=True)
    ]
    grad_rows, grad_weight, grad_bias = sums
    if grad_bias is not None:
        grad_bias.zero_()
    scratch = Scratch()
    with _no_autocast(rows):
        for tokens in chunks.blocks(rows):
            block = _block_losses(
                rows[tokens],
                head,
                targets.take(tokens),
                None if weights is None else weights.take(tokens),
                chunk=chunks.vocab,
                scratch=scratch,
            )
            if ce is not None and block.ce is not None:
                ce[tokens] = block.ce
            if divergence is not None and block.divergence is not None:
                divergence[tokens] = block.divergence
            if block.gradient is None:
                continue
            if grad_rows is not None:
                rows_gradient(grad_rows[tokens], block.gradient, head, chunk=chunks.vocab, dtype=rows.dtype)
            if grad_weight is not None:
                gradient = block.gradient.to(rows.dtype) if rows.is_cuda else block.gradient
                matmul_into(grad_weight, gradient, rows[tokens], add=tokens.start > 0)
            if grad_bias is not None:
                grad_bias += block.gradient.sum(1, dtype=grad_bias.dtype)
    return _Run(
        ce,
        divergence,
        grad_rows,
        None if grad_weight is None else grad_weight.to(head.weight.dtype),
        None if grad_bias is None or head.bias is None else grad_bias.to(head.bias.dtype),
    )


def _block_losses(
    rows: Tensor, head: LinearHead, targets: Targets, weights: TermWeights | None, *, chunk: int, scratch: Scratch
) -> BlockLosses:
    if rows.is_cuda and kernels_take(rows, head, targets):
        from distill import gpu_blocks

        return gpu_blocks.block_losses(rows, head=head, targets=targets, weights=weights)
    return block_losses(rows, head=head, targets=targets, weights=weights, chunk=chunk, scratch=scratch)


def kernels_take(rows: Tensor, head: LinearHead, targets: Targets) -> bool:
    """Tell whether kernels can be compiled, and all factors are in one of the types that they write; warn if not."""
    teacher_head = targets.teacher_head or head
    factors = {"rows": rows, "head": head.weight}
    if targets.teacher_rows is not None:
        factors |= {"teacher's rows": targets.teacher_rows, "teacher's head": teacher_head.weight}
    if {factor.dtype for factor in factors.values()} in ({torch.bfloat16}, {torch.float32}):
        return can_compile_kernels()
    _warn_of_dtypes(", ".join(f"{name} {str(factor.dtype)[6:]}" for name, factor in factors.items()))
    return False


@cache
def _warn_of_dtypes(found: str) -> None:
    logger.warning(
        "the losses through a head are slow: every block turns its factors to float32, because they are not all "
        "bfloat16 or all float32, found %s. Build the cache with cache.teacher.dtype bfloat16, and train the student "
        "in bfloat16",
        found,
    )


@cache
def can_compile_kernels() -> bool:
    """Tell whether Triton is there with a C compiler; warn once of Triton without one."""
    if importlib.util.find_spec("triton") is None:
        return False
    named = os.environ.get("CC")
    if any(shutil.which(name) for name in ((named,) if named else COMPILERS)):
        return True
    logger.warning("Triton finds no C compiler (%s): the losses take twice as long", named or ", ".join(COMPILERS))
    return False


def _incoming(grad_ce: Tensor | None, grad_divergence: Tensor | None) -> TermWeights:
    given = grad_ce if grad_ce is not None else grad_divergence
    assert given is not None
    zeros = torch.zeros_like(given)
    return TermWeights(zeros if grad_ce is None else grad_ce, zeros if grad_divergence is None else grad_divergence)


def _weighted_otherwise(weights: TermWeights, divergence_weight: float) -> Tensor | None:
    """Return the tokens whose terms are not weighted as foreseen; None where that shows without reading values."""
    ce, divergence = weights
    same_memory = ce.data_ptr() == divergence.data_ptr() and ce.stride() == divergence.stride()
    if divergence_weight == 1 and same_memory:
        return None
    return (divergence != divergence_weight * ce).nonzero()[:, 0]


def _no_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    return torch.autocast(tensor.device.type, enabled=False)
