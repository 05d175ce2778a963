"""An output head as tensors: its logits, vocabulary first, and what a gradient at them means for the rows.

Logits lie as ``[vocab, tokens]``: processors multiply the weight by a few rows faster than the rows by the weight, and
statistics per token then need no extra axis. Arithmetic is in float32, or in float64 for float64 rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

ADDED_AT_ONCE = 16384
"""Rows of a product that exist beside the sum they are added to: a head's gradient has one per vocabulary entry."""


@dataclass(frozen=True, kw_only=True)
class LinearHead:
    """``logits = softcap(logit_scale * (rows @ weight.T + bias))``, ``softcap(u) = c tanh(u / c)``."""

    weight: "Float[Tensor, 'vocab hidden']"
    bias: "Float[Tensor, ' vocab'] | None" = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary."""
        return self.weight.shape[0]

    @property
    def requires_grad(self) -> bool:
        """Whether weight or bias is trained."""
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def detached(self) -> Self:
        """Return the same head outside of any graph."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def fill(self, logits: Float[Tensor, "entries tokens"], rows: Float[Tensor, "tokens hidden"], vocab: slice) -> None:
        """Write the logits of a slice of the vocabulary."""
        matmul_into(logits, self.weight[vocab], rows.T)
        self.finish(logits, bias=None if self.bias is None else self.bias[vocab, None])

    def finish(self, logits: Tensor, *, bias: Tensor | None) -> None:
        """Turn products with the weight into logits, in their place; the bias broadcasts against them."""
        if bias is not None:
            logits += bias
        if self.logit_scale != 1:
            logits *= self.logit_scale
        if self.logit_softcap is not None:
            logits.div_(self.logit_softcap).tanh_().mul_(self.logit_softcap)

    def slope(self, logits: Float[Tensor, "entries tokens"]) -> Float[Tensor, "entries tokens"] | float:
        """Return the derivative of the logits by ``rows @ weight.T + bias``."""
        if self.logit_softcap is None:
            return self.logit_scale
        return (logits / self.logit_softcap).square_().neg_().add_(1).mul_(self.logit_scale)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64 and float32 for everything else."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def matmul_into(
    out: Float[Tensor, "m n"], left: Float[Tensor, "m k"], right: Float[Tensor, "k n"], *, add: bool = False
) -> None:
    """Write ``left @ right`` to ``out``, or add it; on CUDA two bf16 factors stay on the tensor cores."""
    if left.is_cuda and left.dtype == right.dtype == torch.bfloat16 and out.dtype is torch.float32:
        if not add:
            torch.mm(left, right, out_dtype=torch.float32, out=out)
            return
        for part in slices(len(left), ADDED_AT_ONCE):
            out[part].add_(torch.mm(left[part], right, out_dtype=torch.float32))
        return
    left, right = left.to(out.dtype), right.to(out.dtype)
    if add:
        out.addmm_(left, right)
    else:
        torch.mm(left, right, out=out)


def slices(total: int, size: int) -> Iterator[slice]:
    """Yield consecutive slices of at most ``size``."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
