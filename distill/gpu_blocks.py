"""The losses of a block of tokens on a GPU, where each pass over the logits is a pass over the device's memory.

The arithmetic is that of `distill.logit_blocks`, in float32. There a block is many small operations on pieces that fit
a processor's cache; on an H100 they took twice as long as a dense computation (docs/benchmarks.md). Here one kernel
finds the normalizers, and one makes divergence and gradient in the same pass.
"""

from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.divergences import FORWARD_KL, Divergence
from distill.linear_head import LinearHead, matmul_into
from distill.logit_blocks import BlockLosses
from distill.loss_kernels import BUCKET, CHUNK, KINDS, normalizer_kernel, terms_kernel
from distill.teacher_terms import Normalizer, Projection, Targets, TermWeights, TopkTerm, join_normalizers

WARPS: Final = 8


@dataclass(kw_only=True)
class _Block:
    """The logits of a block, and what they are held against."""

    student: Float[Tensor, "tokens vocab"]
    plain: Normalizer
    labels: Int[Tensor, " tokens"] | None
    head: LinearHead
    divergence: Divergence = FORWARD_KL
    teacher: Float[Tensor, "tokens vocab"] | None = None
    q: Normalizer | None = None
    """Of the student's logits at the temperature, or of those outside of the teacher's top-k."""
    p: Normalizer | None = None
    """Of the teacher's."""

    @property
    def kind(self) -> int:
        """The kernel's number of what the teacher contributes."""
        if self.teacher is not None:
            return KINDS[self.divergence.kind]
        return 0 if self.q is None else BUCKET


def block_losses(
    rows: Float[Tensor, "tokens hidden"], *, head: LinearHead, targets: Targets, weights: TermWeights | None
) -> BlockLosses:
    """Return the losses of one block of tokens, and its gradient, in the rows' dtype, where weights are given."""
    if weights is not None:
        # kernels know no strides, and autograd hands down one value for all tokens where losses are summed up
        weights = TermWeights(*(one.contiguous() for one in weights))
    student = _logits(rows, head)
    plain = _normalizer(student)
    ce = labels = None
    if targets.labels is not None:
        labels = targets.labels.clamp(0, head.vocab_size - 1)
        ce = plain.log_probabilities(student.gather(1, labels[:, None])[:, 0]).neg_().clamp_(min=0)
    block = _Block(student=student, plain=plain, labels=labels, head=head)
    gradient = None
    if weights is not None:
        gradient = student if rows.dtype is student.dtype else torch.empty_like(student, dtype=rows.dtype)
    if targets.divergence is None:
        value = None
        if weights is not None:
            _launch(block, weights=weights, gradient=gradient)
    elif targets.teacher_rows is None:
        value = _topk(block, targets, weights=weights, gradient=gradient)
    else:
        value = _divergence(block, targets, weights=weights, gradient=gradient)
    return BlockLosses(ce, value, None if gradient is None else gradient.T)


def _divergence(
    block: _Block, targets: Targets, *, weights: TermWeights | None, gradient: Tensor | None
) -> Float[Tensor, " tokens"]:
    """Return the divergence from a teacher whose logits are all there, and write the gradient of all terms."""
    assert targets.divergence is not None
    assert targets.teacher_rows is not None
    temperature = targets.temperature
    block.divergence = targets.divergence
    block.teacher = _logits(targets.teacher_rows, targets.teacher_head or block.head)
    block.q = block.plain if temperature == 1 else _normalizer(block.student, temperature=temperature)
    block.p = _normalizer(block.teacher, temperature=temperature)
    if weights is None:
        sums = _launch(block)
    elif targets.divergence.gradient_needs_mean:
        sums = _launch(block)
        _launch(block, weights=weights, gradient=gradient, mean=sums[1].float())
    else:
        sums = _launch(block, weights=weights, gradient=gradient)
    return sums[0].clamp_(min=0).float()


def _topk(
    block: _Block, targets: Targets, *, weights: TermWeights | None, gradient: Tensor | None
) -> Float[Tensor, " tokens"]:
    """Return the divergence from a teacher of whom the top-k are known, and write the gradient of all terms."""
    student = Projection(block.student.T, block.plain, block.plain)
    term = TopkTerm(student, targets, lambda logits: _normalizer(logits.T))
    if weights is not None and gradient is not None:
        block.q = term.rest
        _launch(block, weights=weights._replace(divergence=weights.divergence * term.rest_slope), gradient=gradient)
        term.write_topk(gradient.T, weights, with_ce=block.labels is not None, head=block.head, labels=block.labels)
    return term.value()


def _launch(
    block: _Block,
    *,
    weights: TermWeights | None = None,
    gradient: Tensor | None = None,
    mean: Float[Tensor, " tokens"] | None = None,
) -> Float[Tensor, "2 tokens"]:
    """Return the divergence and the mean that its gradient is measured from, and write the gradient of all terms.

    Where that needs the mean, it is not summed up at the same time.
    """
    divergence, head = block.divergence, block.head
    sums = block.student.new_zeros(2, _num_chunks(block.student), len(block.student))
    terms_kernel[_grid(block.student)](
        block.student,
        block.teacher,
        gradient,
        sums,
        block.labels,
        *block.plain,
        *(block.q or (None, None)),
        *(block.p or (None, None)),
        *(weights or (None, None)),
        mean,
        *block.student.shape,
        divergence.temperature,
        divergence.beta,
        head.logit_scale,
        head.logit_softcap or 1.0,
        kind=block.kind,
        with_ce=block.labels is not None,
        with_softcap=head.logit_softcap is not None,
        writes=gradient is not None,
        chunk_size=CHUNK,
        num_warps=WARPS,
    )
    # in float64, so that many chunks round no more than one
    return sums.double().sum(1)


def _logits(rows: Tensor, head: LinearHead) -> Float[Tensor, "tokens vocab"]:
    logits = rows.new_empty(len(rows), head.vocab_size, dtype=torch.float32)
    matmul_into(logits, rows, head.weight.T)
    head.finish(logits, bias=head.bias)
    return logits


def _normalizer(logits: Tensor, *, temperature: float = 1.0) -> Normalizer:
    peaks, masses = logits.new_empty(2, _num_chunks(logits), len(logits))
    normalizer_kernel[_grid(logits)](
        logits, peaks, masses, *logits.shape, temperature, chunk_size=CHUNK, num_warps=WARPS
    )
    return join_normalizers(peaks, masses)


def _num_chunks(logits: Tensor) -> int:
    return -(-logits.shape[1] // CHUNK)


def _grid(logits: Tensor) -> tuple[int, int]:
    return _num_chunks(logits), len(logits)
