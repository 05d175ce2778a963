"""Logits of a few rows, and their gradient, against a dense computation in float64."""

import pytest
import torch
from torch import Tensor

from distill import head_logits as module
from distill.baselines import uld_loss_of_rows
from distill.config import BaselineOptions
from distill.head_logits import head_logits
from distill.linear_head import LinearHead
from distill.logit_targets import LogitTargets
from distill.uld import align_spans

FORMS = [{}, {"logit_scale": 0.5}, {"logit_softcap": 3.0, "logit_scale": 2.0}]


def draw(*size: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_are_those_of_the_formula_and_gradients_those_of_differences(
    form: dict[str, float], with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ENTRIES", 4)
    rows, weight = draw(3, 5, seed=0).requires_grad_(), draw(11, 5, seed=1).requires_grad_()
    bias = draw(11, seed=2).requires_grad_() if with_bias else None
    plain = rows @ weight.T + (0 if bias is None else bias)
    expected = form.get("logit_scale", 1.0) * plain
    if "logit_softcap" in form:
        expected = 3 * torch.tanh(expected / 3)

    def logits(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return head_logits(rows, LinearHead(weight=weight, bias=bias, **form))

    torch.testing.assert_close(logits(rows, weight, bias), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(logits, (rows, weight, bias))


def test_bfloat16_rows_and_weights_have_float32_logits() -> None:
    rows, weight = draw(4, 64, seed=0, dtype=torch.bfloat16), draw(500, 64, seed=1, dtype=torch.bfloat16)
    rows.requires_grad_()
    logits = head_logits(rows, LinearHead(weight=weight))
    exact = rows.detach().double() @ weight.double().T
    assert logits.dtype is torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    logits.square().sum().backward()
    assert rows.grad is not None
    assert rows.grad.dtype is torch.bfloat16
    torch.testing.assert_close(rows.grad.double(), 2 * exact @ weight.double(), rtol=2**-8, atol=0.1)


def test_uld_of_a_bfloat16_student_points_where_float64_does() -> None:
    weight, rows = draw(4000, 128, seed=0), draw(6, 128, seed=1)
    teacher_rows = rows + 0.1 * draw(6, 128, seed=2)
    ends = {"student_ends": torch.arange(1, 7).numpy(), "teacher_ends": torch.arange(1, 7).numpy()}
    spans = align_spans(**ends, student_lengths=[6], teacher_lengths=[6])
    gradients, losses = [], []
    for dtype in (torch.float64, torch.bfloat16):
        # the same numbers on both sides: what is compared is the arithmetic
        own = (0.15 * rows).bfloat16().to(dtype).requires_grad_()
        theirs, head = (0.15 * teacher_rows).bfloat16().to(dtype), LinearHead(weight=weight.bfloat16().to(dtype))
        targets = LogitTargets(labels=torch.arange(6), rows=theirs, spans=spans)
        loss = uld_loss_of_rows(
            own, head=head, labels=torch.arange(6), targets=targets, teacher_head=head, options=BaselineOptions()
        )
        loss.sum().backward()
        assert own.grad is not None
        gradients.append(own.grad.double())
        losses.append(loss.detach().double())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-5)
    assert torch.cosine_similarity(*gradients, dim=1).min() > 0.99
