"""The engine of the losses through a head: all logits of a few tokens at a time, made once.

A block holds the logits of ``ChunkSizes.rows`` tokens over the whole vocabulary, in memory that every block uses again.
It is gone through in pieces of ``ChunkSizes.vocab`` entries that fit the processor's cache: first the log-sum-exp
(an online softmax), then the losses, then the gradient in the place of the logits. Nothing is computed twice, so the
products with the weight are as many as without blocks: one per side, and one for the gradient.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from distill.linear_head import LinearHead, accumulation_dtype, matmul_into, slices
from distill.teacher_terms import (
    OnlineSoftmax,
    Projection,
    Targets,
    TeacherTerm,
    TermWeights,
    TopkTerm,
    chunked_normalizer,
)

BLOCK_ROWS = {"cpu": 64, "cuda": 1024}
"""Tokens per block: enough that the products run at full speed, few enough that their logits are small."""


@dataclass(frozen=True, kw_only=True)
class ChunkSizes:
    """How much of the logits exists at a time."""

    rows: int | None = None
    """Tokens per block; by default what suits the device, see `BLOCK_ROWS`."""
    vocab: int = 4096
    """Vocabulary entries that are worked on at a time."""

    def __post_init__(self) -> None:
        if self.vocab < 1 or (self.rows is not None and self.rows < 1):
            raise ValueError(f"chunk sizes must be at least 1, found rows={self.rows}, vocab={self.vocab}")

    def blocks(self, rows: Tensor) -> Iterator[slice]:
        """Yield the tokens of each block, shared out evenly."""
        tokens, limit = rows.shape[0], self.rows or BLOCK_ROWS["cuda" if rows.is_cuda else "cpu"]
        if tokens == 0:
            return iter(())
        even = -(-tokens // -(-tokens // limit))
        return slices(tokens, min(limit, -(-even // 8) * 8))


DEFAULT_CHUNKS = ChunkSizes()


class BlockLosses(NamedTuple):
    """The losses of one block, and its weighted gradient at ``rows @ weight.T + bias`` where weights were given."""

    ce: Float[Tensor, " tokens"] | None
    divergence: Float[Tensor, " tokens"] | None
    gradient: Float[Tensor, "vocab tokens"] | None


class Scratch:
    """Memory for logits that all blocks share: fresh pages cost as much as a pass over them."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def logits(self, rows: Tensor, *, vocab_size: int, tokens: int) -> Float[Tensor, "vocab tokens"]:
        """Return uninitialised logits; the first block is the largest."""
        if self._memory is None:
            self._memory = rows.new_empty(vocab_size * tokens, dtype=accumulation_dtype(rows.dtype))
        return self._memory[: vocab_size * tokens].view(vocab_size, tokens)


def block_losses(
    rows: Float[Tensor, "tokens hidden"],
    *,
    head: LinearHead,
    targets: Targets,
    weights: TermWeights | None,
    chunk: int,
    scratch: Scratch,
) -> BlockLosses:
    """Return the losses of one block of tokens, and its gradient where weights are given."""
    student, teacher = _project_both(rows, head, targets, chunk, scratch)
    ce = at_label = None
    if targets.labels is not None:
        labels = targets.labels.clamp(0, head.vocab_size - 1)[None]
        label_logits = student.logits.gather(0, labels)
        ce = student.plain.log_probabilities(label_logits)[0].neg_().clamp_(min=0)
        at_label = head.slope(label_logits)
    term: TeacherTerm | TopkTerm | None = None
    if targets.divergence is not None:
        if teacher is None:
            term = TopkTerm(student, targets, lambda logits: chunked_normalizer(logits, chunk))
        else:
            term = TeacherTerm(student, teacher, targets, chunk)
    gradient = None
    if weights is not None:
        gradient = _gradient(student, head, ce is not None, term, weights, chunk)
        if at_label is not None:
            gradient.scatter_add_(0, labels, -weights.ce[None] * at_label)
    return BlockLosses(ce, None if term is None else term.value(), gradient)


def _project_both(
    rows: Tensor, head: LinearHead, targets: Targets, chunk: int, scratch: Scratch
) -> tuple[Projection, Projection | None]:
    """Return the logits of the rows, and the teacher's where it has rows."""
    tokens, teacher_rows, temperature = rows.shape[0], targets.teacher_rows, targets.temperature
    room = scratch.logits(rows, vocab_size=head.vocab_size, tokens=tokens * (1 if teacher_rows is None else 2))
    if teacher_rows is None:
        return _project(rows, head, chunk, temperature, room), None
    if targets.teacher_head is None and teacher_rows.dtype == rows.dtype:
        # one product for both sides
        both = _project(torch.cat([rows, teacher_rows]), head, chunk, temperature, room)
        return both.take(slice(0, tokens)), both.take(slice(tokens, None))
    teacher_head = targets.teacher_head or head
    student = _project(rows, head, chunk, temperature, room[:, :tokens])
    return student, _project(teacher_rows, teacher_head, chunk, temperature, room[:, tokens:])


def _project(rows: Tensor, head: LinearHead, chunk: int, temperature: float, room: Tensor) -> Projection:
    """Write the logits of some rows, and return them with their normalizers."""
    plain, tempered = OnlineSoftmax(room, chunk), OnlineSoftmax(room, chunk)
    for vocab in slices(head.vocab_size, chunk):
        logits = room[vocab]
        head.fill(logits, rows, vocab)
        plain.add(logits)
        if temperature != 1:
            tempered.add(logits / temperature)
    normalizer = plain.normalizer()
    return Projection(room, normalizer, normalizer if temperature == 1 else tempered.normalizer())


def _gradient(
    student: Projection,
    head: LinearHead,
    with_ce: bool,
    term: TeacherTerm | TopkTerm | None,
    weights: TermWeights,
    chunk: int,
) -> Tensor:
    """Write the gradient without its part at the labels over the logits."""
    for vocab in slices(head.vocab_size, chunk):
        logits = student.logits[vocab]
        slope = head.slope(logits)
        gradient = None if term is None else term.gradient(vocab).mul_(weights.divergence)
        if with_ce:
            logits.sub_(student.plain.peak).exp_().mul_(weights.ce * (-student.plain.log_mass).exp())
            gradient = logits if gradient is None else logits.add_(gradient)
        assert gradient is not None
        if not (isinstance(slope, float) and slope == 1):
            gradient.mul_(slope)
        if gradient is not logits:
            logits.copy_(gradient)
    if isinstance(term, TopkTerm):
        term.write_topk(student.logits, weights, with_ce=with_ce, head=head)
    return student.logits


def rows_gradient(
    out: Float[Tensor, "tokens hidden"],
    gradient: Float[Tensor, "vocab tokens"],
    head: LinearHead,
    *,
    chunk: int,
    dtype: torch.dtype,
) -> None:
    """Write ``gradient.T @ weight``, a slice of the vocabulary at a time.

    On a GPU the gradient is first rounded to ``dtype``, that of the rows, for the tensor cores; where it is already,
    one product does it.
    """
    if gradient.is_cuda and gradient.dtype is dtype:
        matmul_into(out, gradient.T, head.weight)
        return
    for vocab in slices(head.vocab_size, chunk):
        part = gradient[vocab].T
        matmul_into(out, part.to(dtype) if part.is_cuda else part, head.weight[vocab], add=vocab.start > 0)
