"""The losses to compare: forward and backward pass of cross-entropy and forward KL through a frozen head, per library.

Every side gets the same inputs and gives the sum over tokens with its gradient at the rows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from distill.losses import linear_ce_kl, linear_divergence


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one problem."""

    tokens: int
    vocab: int
    hidden: int


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Inputs of the losses."""

    rows: Tensor
    teacher_rows: Tensor
    weight: Tensor
    labels: Tensor


Side = Callable[[Problem], tuple[Tensor, Tensor]]
"""Returns the loss and its gradient at the rows."""


def make_problem(
    shape: Shape, *, size: float = 1.0, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> Problem:
    """Return random inputs whose logits have about the given standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    rows, teacher_rows = size * torch.randn(2, shape.tokens, shape.hidden, generator=generator)
    weight = torch.randn(shape.vocab, shape.hidden, generator=generator).div_(math.sqrt(shape.hidden))
    labels = torch.randint(shape.vocab, (shape.tokens,), generator=generator)
    return Problem(
        rows=rows.to(device, dtype),
        teacher_rows=teacher_rows.to(device, dtype),
        weight=weight.to(device, dtype),
        labels=labels.to(device),
    )


def own(problem: Problem) -> tuple[Tensor, Tensor]:
    """Cross-entropy and forward KL of this project."""
    rows = _leaf(problem)
    losses = linear_ce_kl(rows, teacher_rows=problem.teacher_rows, weight=problem.weight, labels=problem.labels)
    return _backward((losses.ce_loss + losses.kl_loss).sum(), rows)


def own_kl(problem: Problem) -> tuple[Tensor, Tensor]:
    """Forward KL of this project alone."""
    rows = _leaf(problem)
    return _backward(linear_divergence(rows, teacher_rows=problem.teacher_rows, weight=problem.weight).sum(), rows)


def dense(problem: Problem) -> tuple[Tensor, Tensor]:
    """Torch with all logits."""
    rows = _leaf(problem)
    log_q = (rows @ problem.weight.T).to(_wide(rows)).log_softmax(-1)
    log_p = (problem.teacher_rows @ problem.weight.T).to(_wide(rows)).log_softmax(-1)
    ce = functional.nll_loss(log_q, problem.labels, reduction="sum")
    return _backward(ce + functional.kl_div(log_q, log_p, log_target=True, reduction="sum"), rows)


def liger(problem: Problem) -> tuple[Tensor, Tensor]:
    """Liger's fused linear JSD at beta 0 with its hard loss, in chunks of 128 tokens, not compiled."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    rows, weight = _leaf(problem), problem.weight
    loss = LigerFusedLinearJSDFunction.apply(
        *(rows, weight, problem.teacher_rows, weight, problem.labels, None, None, 1.0, 1.0, 0.0, -100, 1.0, False, 128)
    )
    return _backward(loss * len(rows), rows)


def torchtune(problem: Problem) -> tuple[Tensor, Tensor]:
    """Torchtune's chunked cross-entropy and forward KL, 8 chunks. Its KL lacks the teacher's entropy."""
    from torchtune.modules.loss import CEWithChunkedOutputLoss, ForwardKLWithChunkedOutputLoss

    rows = _leaf(problem)
    student = [chunk @ problem.weight.T for chunk in rows[None].chunk(8, dim=1)]
    teacher = [chunk @ problem.weight.T for chunk in problem.teacher_rows[None].chunk(8, dim=1)]
    labels = problem.labels[None]
    loss = CEWithChunkedOutputLoss()(student, labels) + ForwardKLWithChunkedOutputLoss()(student, teacher, labels)
    return _backward(loss * len(rows), rows)


def trl_kl(problem: Problem) -> tuple[Tensor, Tensor]:
    """TRL's chunked divergence at beta 0: forward KL alone."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    rows, weight = _leaf(problem), problem.weight
    losses, _ = ChunkedDivergenceFunction.apply(rows, weight, None, problem.teacher_rows, weight, None, 0.0)
    return _backward(losses.sum(), rows)


def dense_kl(problem: Problem) -> tuple[Tensor, Tensor]:
    """Torch with all logits, without the cross-entropy."""
    rows = _leaf(problem)
    log_q, log_p = ((side @ problem.weight.T).log_softmax(-1) for side in (rows, problem.teacher_rows))
    return _backward(functional.kl_div(log_q, log_p, log_target=True, reduction="sum"), rows)


CE_KL: dict[str, Side] = {"dense torch": dense, "Liger": liger, "torchtune": torchtune}
KL: dict[str, Side] = {"dense torch": dense_kl, "TRL": trl_kl}


def _leaf(problem: Problem) -> Tensor:
    return problem.rows.detach().clone().requires_grad_()


def _wide(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype is torch.float64 else torch.float32


def _backward(loss: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    (gradient,) = torch.autograd.grad(loss, rows)
    return loss.detach(), gradient
