"""All logits of a few rows, in float32 whatever the rows are in, with their gradient."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.linear_head import LinearHead, accumulation_dtype, matmul_into, slices
from distill.logit_blocks import rows_gradient

CHUNK_ENTRIES = 16384
"""Entries of the vocabulary whose weights may be turned to float32 at a time."""


def head_logits(rows: Float[Tensor, "rows hidden"], head: LinearHead) -> Float[Tensor, "rows vocab"]:
    """Return the logits of rows; in float64 for float64 rows.

    Why: a product in bfloat16 is off by a tenth at a logit of 20, which turns the signs of small differences around.
    """
    return _HeadLogits.apply(rows, head.weight, head.bias, head)


class _HeadLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, head: LinearHead) -> Tensor:
        ctx.head = head.detached()
        logits = rows.new_empty(head.vocab_size, len(rows), dtype=accumulation_dtype(rows.dtype))
        for vocab in slices(head.vocab_size, CHUNK_ENTRIES):
            ctx.head.fill(logits[vocab], rows, vocab)
        ctx.save_for_backward(rows, None if head.logit_softcap is None else logits)
        return logits.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        rows, logits = ctx.saved_tensors
        head: LinearHead = ctx.head
        gradient = incoming.T * (head.logit_scale if logits is None else head.slope(logits))
        grad_rows = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_rows = torch.empty_like(rows, dtype=gradient.dtype)
            rows_gradient(grad_rows, gradient, head, chunk=CHUNK_ENTRIES, dtype=rows.dtype)
            grad_rows = grad_rows.to(rows.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(head.weight, dtype=gradient.dtype)
            matmul_into(grad_weight, gradient, rows)
            grad_weight = grad_weight.to(head.weight.dtype)
        if ctx.needs_input_grad[2]:
            assert head.bias is not None
            grad_bias = gradient.sum(1).to(head.bias.dtype)
        return grad_rows, grad_weight, grad_bias, None
