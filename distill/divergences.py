"""Divergences between teacher and student: the value, and the gradient at the student's logits, of a block of entries.

A block is a slice of the vocabulary by tokens, ``[entries, tokens]``. What is summed over all blocks of the vocabulary
is the divergence, and the gradient of any block can be told once that sum is known.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from distill.loss_names import DivergenceKind


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """How far the student's distribution ``q`` is from the teacher's ``p``.

    ``forward_kl``: ``KL(p || q)``, the paper's; ``reverse_kl``: ``KL(q || p)``; ``jensen_shannon``:
    ``beta KL(p || m) + (1 - beta) KL(q || m)`` with ``m = beta p + (1 - beta) q`` (arXiv 2306.13649).
    """

    kind: DivergenceKind = "forward_kl"
    beta: float = 0.5
    """The teacher's share in the mixture of ``jensen_shannon``."""
    temperature: float = 1.0
    """Divides the logits of both sides. The value is not multiplied by its square; weigh it so where that is wanted."""

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ValueError(f"a divergence needs 0 < beta < 1, found {self.beta}: use forward_kl or reverse_kl")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"a divergence needs a temperature above 0, found {self.temperature}")

    @property
    def gradient_needs_mean(self) -> bool:
        """Whether the gradient of one block depends on all others."""
        return self.kind != "forward_kl"


FORWARD_KL = Divergence()


class BlockSums(NamedTuple):
    """Sums over the entries of one block."""

    value: Float[Tensor, " tokens"]
    mean: Float[Tensor, " tokens"] | float
    """Expectation under the student of what the gradient is measured from."""


def block_sums(
    divergence: Divergence, log_q: Float[Tensor, "entries tokens"], log_p: Float[Tensor, "entries tokens"]
) -> BlockSums:
    """Return a block's share in the divergence. ``log_q`` and ``log_p`` are log-probabilities at the temperature."""
    if divergence.kind == "forward_kl":
        return BlockSums(log_p.exp().mul_(log_p - log_q).sum(0), 0.0)
    if divergence.kind == "reverse_kl":
        value = log_q.exp().mul_(log_q - log_p).sum(0)
        return BlockSums(value, value)
    log_m = _log_mixture(divergence, log_q, log_p)
    mean = log_q.exp().mul_(log_q - log_m).sum(0)
    teacher = log_p.exp().mul_(log_p - log_m).sum(0)
    return BlockSums(divergence.beta * teacher + (1 - divergence.beta) * mean, mean)


def block_gradient(
    divergence: Divergence,
    log_q: Float[Tensor, "entries tokens"],
    log_p: Float[Tensor, "entries tokens"],
    mean: Float[Tensor, " tokens"] | float,
) -> Float[Tensor, "entries tokens"]:
    """Return the derivative by the student's logits over temperature: ``q (f - E_q[f])``, for forward KL ``q - p``.

    ``f`` is ``log q - log p`` for reverse KL and ``(1 - beta) (log q - log m)`` for Jensen-Shannon.
    """
    q = log_q.exp()
    if divergence.kind == "forward_kl":
        return q.sub_(log_p.exp())
    if divergence.kind == "reverse_kl":
        return q.mul_((log_q - log_p).sub_(mean))
    log_m = _log_mixture(divergence, log_q, log_p)
    return q.mul_((log_q - log_m).sub_(mean).mul_(1 - divergence.beta))


def _log_mixture(divergence: Divergence, log_q: Tensor, log_p: Tensor) -> Tensor:
    return (log_p + math.log(divergence.beta)).logaddexp(log_q + math.log1p(-divergence.beta))
