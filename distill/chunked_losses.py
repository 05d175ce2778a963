"""Cross-entropy and KL through a large output projection, without ever holding a row of logits per token.

Logits are computed in blocks of ``ChunkSizes.rows`` tokens by ``ChunkSizes.vocab`` entries. The forward pass keeps a
running log-sum-exp per token (an online softmax); the backward pass computes each block again and turns it into its
share of the gradient. Arithmetic is in float32, or float64 when the rows are float64.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, kw_only=True)
class ChunkSizes:
    """Block size of the logits."""

    rows: int = 1024
    """Tokens per block."""
    vocab: int = 8192
    """Vocabulary entries per block."""

    def __post_init__(self) -> None:
        if min(self.rows, self.vocab) < 1:
            raise ValueError(f"chunk sizes must be at least 1, found rows={self.rows}, vocab={self.vocab}")


DEFAULT_CHUNKS = ChunkSizes()


class TokenLosses(NamedTuple):
    """Nats per token, unreduced. A tuple, so that ZeRO-3's module hooks see the tensors inside."""

    ce_loss: Float[Tensor, " tokens"]
    """``-log p(label)`` under the rows' softmax."""
    kl_loss: Float[Tensor, " tokens"]
    """``KL(teacher || rows)``: forward KL over the full vocabulary."""


def linear_ce_kl(
    rows: Float[Tensor, "tokens hidden"],
    *,
    teacher_rows: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, " tokens"],
    bias: Float[Tensor, " vocab"] | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunks: ChunkSizes = DEFAULT_CHUNKS,
) -> TokenLosses:
    """Return both distillation terms of GenRecal through the frozen teacher head.

    Formula: ``s = H(rows)``, ``t = H(teacher_rows)``, ``H(x) = softcap(logit_scale * (x @ weight.T + bias))``,
    ``softcap(u) = logit_softcap * tanh(u / logit_softcap)``; ``ce = lse(s) - s[label]`` and
    ``kl = sum_v softmax(t)_v (t_v - s_v) - lse(t) + lse(s)``. Softmax is applied inside.
    Why: at 152k entries the logits of 200 answer tokens alone are 122 MB per sample, several times over.
    Source: arXiv 2506.15681, L_ar and L_reg; the online softmax is arXiv 1805.02867.

    The gradient reaches ``rows`` only and is exact for any incoming weight per token and per term.
    """
    if teacher_rows.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError(
            "linear_ce_kl gives no gradient to the teacher: expected frozen teacher_rows, weight and bias, found "
            "requires_grad=True. Freeze the teacher's head and detach its rows"
        )
    head = _Head(logit_scale=logit_scale, logit_softcap=logit_softcap, chunks=chunks)
    _check_labels(labels, vocab_size=weight.shape[0])
    return TokenLosses(*_LinearLosses.apply(rows, weight, bias, teacher_rows, labels.long(), head))


def linear_ce(
    rows: Float[Tensor, "tokens hidden"],
    *,
    weight: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, " tokens"],
    bias: Float[Tensor, " vocab"] | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunks: ChunkSizes = DEFAULT_CHUNKS,
) -> Float[Tensor, " tokens"]:
    """Return the cross-entropy of each token through a linear head: nats per token, unreduced.

    Formula: ``lse(s) - s[label]`` with ``s = softcap(logit_scale * (rows @ weight.T + bias))``; softmax inside.
    Why: the student's own loss at a vocabulary whose logits do not fit. Gradients reach ``rows``, ``weight`` and
    ``bias``, each where it requires one. Under ZeRO-3 call it inside the engine's forward, where the weight exists.
    Source: the cross-entropy of arXiv 2411.09009 (cut cross-entropy), here in plain torch.
    """
    head = _Head(logit_scale=logit_scale, logit_softcap=logit_softcap, chunks=chunks)
    _check_labels(labels, vocab_size=weight.shape[0])
    ce_loss, _ = _LinearLosses.apply(rows, weight, bias, None, labels.long(), head)
    return ce_loss


@dataclass(frozen=True, kw_only=True)
class _Head:
    """Everything about the head that is not a tensor."""

    logit_scale: float
    logit_softcap: float | None
    chunks: ChunkSizes

    def logits(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return one block of logits in the accumulation dtype."""
        logits = _matmul(rows, weight.T)
        if bias is not None:
            logits += bias
        logits *= self.logit_scale
        if self.logit_softcap is None:
            return logits
        return logits.div_(self.logit_softcap).tanh_().mul_(self.logit_softcap)

    def to_linear_gradient(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Turn the gradient of a block of logits into that of ``rows @ weight.T + bias``, in place."""
        if self.logit_softcap is not None:
            grad *= 1 - (logits / self.logit_softcap).square_()
        return grad.mul_(self.logit_scale)


class _LinearLosses(torch.autograd.Function):
    """CE, and KL where teacher rows are given. Saves the inputs and one log-sum-exp per token and side."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_rows: Tensor | None,
        labels: Tensor,
        head: _Head,
    ) -> tuple[Tensor, Tensor]:
        ctx.head = head
        with _no_autocast(rows):
            ce_loss, kl_loss, student_lse, teacher_lse = _forward(rows, weight, bias, teacher_rows, labels, head)
        ctx.save_for_backward(rows, weight, bias, teacher_rows, labels, student_lse, teacher_lse)
        return ce_loss, kl_loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ce: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias, teacher_rows, labels, student_lse, teacher_lse = ctx.saved_tensors
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype = student_lse.dtype
        grad_rows = torch.zeros_like(rows, dtype=dtype) if needs_rows else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        grad_bias = torch.empty_like(bias) if needs_bias else None
        with _no_autocast(rows):
            for vocab in _slices(weight.shape[0], ctx.head.chunks.vocab):
                weight_sum = torch.zeros_like(weight[vocab], dtype=dtype) if needs_weight else None
                bias_sum = torch.zeros_like(bias[vocab], dtype=dtype) if needs_bias else None
                for block in _slices(rows.shape[0], ctx.head.chunks.rows):
                    teacher = None if teacher_rows is None else (teacher_rows[block], teacher_lse[block])
                    grad = _block_gradient(
                        (rows[block], student_lse[block]),
                        teacher,
                        (weight[vocab], None if bias is None else bias[vocab]),
                        labels=labels[block] - vocab.start,
                        grads=(grad_ce[block], grad_kl[block]),
                        head=ctx.head,
                    )
                    if bias_sum is not None:
                        bias_sum += grad.sum(0)
                    if rows.is_cuda:
                        grad = grad.to(rows.dtype)
                    if grad_rows is not None:
                        grad_rows[block] += _matmul(grad, weight[vocab])
                    if weight_sum is not None:
                        weight_sum += _matmul(grad.T, rows[block])
                if grad_weight is not None and weight_sum is not None:
                    grad_weight[vocab] = weight_sum.to(weight.dtype)
                if grad_bias is not None and bias_sum is not None:
                    grad_bias[vocab] = bias_sum.to(bias.dtype)
        return None if grad_rows is None else grad_rows.to(rows.dtype), grad_weight, grad_bias, None, None, None


def _forward(
    rows: Tensor, weight: Tensor, bias: Tensor | None, teacher_rows: Tensor | None, labels: Tensor, head: _Head
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parts = [
        _forward_rows(
            rows[block], weight, bias, None if teacher_rows is None else teacher_rows[block], labels[block], head
        )
        for block in _slices(rows.shape[0], head.chunks.rows)
    ]
    if not parts:
        empty = rows.new_empty(0, dtype=accumulation_dtype(rows.dtype))
        return empty, empty.clone(), empty.clone(), empty.clone()
    ce_loss, kl_loss, student_lse, teacher_lse = (torch.cat(part) for part in zip(*parts, strict=True))
    return ce_loss, kl_loss, student_lse, teacher_lse


def _forward_rows(
    rows: Tensor, weight: Tensor, bias: Tensor | None, teacher_rows: Tensor | None, labels: Tensor, head: _Head
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return CE, KL and both log-sum-exps of one block of rows, in one pass over the vocabulary."""
    zeros = rows.new_zeros(rows.shape[0], dtype=accumulation_dtype(rows.dtype))
    label_logits, student_lse, teacher_lse = zeros, zeros - torch.inf, zeros - torch.inf
    gap = zeros  # sum over the vocabulary so far of exp(t - teacher_lse) * (t - s)
    for vocab in _slices(weight.shape[0], head.chunks.vocab):
        chunk, chunk_bias = weight[vocab], None if bias is None else bias[vocab]
        logits = head.logits(rows, chunk, chunk_bias)
        local = labels - vocab.start
        inside = (local >= 0) & (local < logits.shape[1])
        picked = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        label_logits = torch.where(inside, picked, label_logits)
        student_lse = torch.logaddexp(student_lse, logits.logsumexp(1))
        if teacher_rows is not None:
            teacher_logits = head.logits(teacher_rows, chunk, chunk_bias)
            new_lse = torch.logaddexp(teacher_lse, teacher_logits.logsumexp(1))
            chunk_gap = _expected_gap(teacher_logits, logits, new_lse)
            gap = gap * (teacher_lse - new_lse).exp() + chunk_gap
            teacher_lse = new_lse
    ce_loss = (student_lse - label_logits).clamp_(min=0)
    if teacher_rows is None:
        return ce_loss, zeros, student_lse, teacher_lse
    # KL >= 0: what rounding leaves below zero is noise.
    return ce_loss, (gap - teacher_lse + student_lse).clamp_(min=0), student_lse, teacher_lse


def _expected_gap(teacher_logits: Tensor, logits: Tensor, teacher_lse: Tensor) -> Tensor:
    probabilities = (teacher_logits - teacher_lse[:, None]).exp_()
    return probabilities.mul_(teacher_logits.sub_(logits)).sum(1)


def _block_gradient(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor] | None,
    weight_and_bias: tuple[Tensor, Tensor | None],
    *,
    labels: Tensor,
    grads: tuple[Tensor, Tensor],
    head: _Head,
) -> Tensor:
    """Return the gradient at ``rows @ weight.T + bias`` of one block: ``g_ce (p - 1[label]) + g_kl (p - p_teacher)``.

    ``student`` and ``teacher`` are rows with their log-sum-exp; ``labels`` count from the block's first entry.
    """
    rows, lse = student
    grad_ce, grad_kl = (grad.to(lse.dtype) for grad in grads)
    logits = head.logits(rows, *weight_and_bias)
    grad = (logits - lse[:, None]).exp_()
    if teacher is None:
        grad *= grad_ce[:, None]
    else:
        teacher_rows, teacher_lse = teacher
        teacher_probabilities = head.logits(teacher_rows, *weight_and_bias).sub_(teacher_lse[:, None]).exp_()
        # In this order p - p_teacher cancels before it is weighted.
        teacher_probabilities.sub_(grad).mul_(grad_kl[:, None])
        grad.mul_(grad_ce[:, None]).sub_(teacher_probabilities)
    inside = (labels >= 0) & (labels < grad.shape[1])
    at_label = torch.where(inside, -grad_ce, 0)[:, None]
    grad.scatter_add_(1, labels.clamp(0, grad.shape[1] - 1)[:, None], at_label)
    return head.to_linear_gradient(grad, logits)


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """Multiply with a result in the accumulation dtype; on CUDA two bf16 factors stay on the tensor cores."""
    if left.is_cuda and left.dtype == right.dtype == torch.bfloat16:
        return torch.mm(left, right, out_dtype=torch.float32)
    dtype = accumulation_dtype(left.dtype)
    return left.to(dtype) @ right.to(dtype)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64 and float32 for everything else."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _no_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    return torch.autocast(tensor.device.type, enabled=False)


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _check_labels(labels: Tensor, *, vocab_size: int) -> None:
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < vocab_size:
        raise ValueError(
            f"labels outside the head's vocabulary: expected 0..{vocab_size - 1}, found {int(labels.min())}.."
            f"{int(labels.max())}. Select the supervised rows first; check that head and token ids come from one model"
        )
