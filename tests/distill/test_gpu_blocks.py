"""The kernels of the losses against the blocks of torch operations in float64: on a GPU, or in Triton's interpreter.

Where triton is installed without a GPU: ``TRITON_INTERPRET=1 pytest -m gpu tests/distill/test_gpu_blocks.py``.
"""

import importlib.util
import os
from dataclasses import replace

import pytest
import torch

from distill import linear_losses
from distill.chunked_losses import linear_ce
from distill.divergences import Divergence
from distill.linear_head import LinearHead
from distill.logit_blocks import Scratch, block_losses
from distill.teacher_terms import Targets, TermWeights

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs an NVIDIA GPU or Triton's interpreter"),
]
TOKENS, VOCAB, HIDDEN = 5, 9001, 16  # two chunks and a part
DIVERGENCES = {
    "none": None,
    "forward KL": Divergence(),
    "forward KL, tempered": Divergence(temperature=1.7),
    "reverse KL": Divergence(kind="reverse_kl"),
    "reverse KL, tempered": Divergence(kind="reverse_kl", temperature=0.6),
    "Jensen-Shannon": Divergence(kind="jensen_shannon", beta=0.3, temperature=1.4),
}
HEADS = {"plain": {}, "scale and softcap": {"logit_scale": 1.7, "logit_softcap": 5.0}}


def normal(*shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_problem(divergence, *, dtype, size=1.0, own_teacher_head=False, with_labels=True, head=None):
    """Rows, head, targets and weights, rounded to a dtype, on a device."""

    def given(values):
        return values.to(dtype).to(DEVICE)

    weight, bias = given(normal(VOCAB, HIDDEN, seed=0) / HIDDEN**0.5), given(normal(VOCAB, seed=1))
    teacher = {}
    if divergence is not None:
        teacher = {"divergence": divergence, "teacher_rows": given(size * normal(TOKENS, HIDDEN, seed=2))}
        if own_teacher_head:
            teacher["teacher_head"] = LinearHead(weight=given(normal(VOCAB, HIDDEN, seed=3) / HIDDEN**0.5))
    labels = torch.tensor([0, VOCAB - 1, 4095, 4096, 77], device=DEVICE) if with_labels else None
    return {
        "rows": given(size * normal(TOKENS, HIDDEN, seed=4)),
        "head": LinearHead(weight=weight, bias=bias, **(head or {})),
        "targets": Targets(labels=labels, **teacher),
        "weights": TermWeights(*(normal(2, TOKENS, seed=5).float().to(DEVICE))),
    }


def in_float64(problem):
    """The same problem, for the reference."""

    def wide(head):
        return LinearHead(
            weight=head.weight.double(),
            bias=None if head.bias is None else head.bias.double(),
            logit_scale=head.logit_scale,
            logit_softcap=head.logit_softcap,
        )

    targets = problem["targets"]
    teacher_rows = None if targets.teacher_rows is None else targets.teacher_rows.double()
    teacher_head = None if targets.teacher_head is None else wide(targets.teacher_head)
    return {
        "rows": problem["rows"].double(),
        "head": wide(problem["head"]),
        "targets": replace(targets, teacher_rows=teacher_rows, teacher_head=teacher_head),
        "weights": TermWeights(*(one.double() for one in problem["weights"])),
    }


def check(problem, *, tolerance, gradient_tolerance):
    from distill import gpu_blocks

    expected = block_losses(**in_float64(problem), chunk=4096, scratch=Scratch())
    without_gradient = gpu_blocks.block_losses(**{**problem, "weights": None})
    assert without_gradient.gradient is None
    found = gpu_blocks.block_losses(**problem)
    assert found.gradient.dtype is problem["rows"].dtype
    for name in ("ce", "divergence"):
        value, reference = getattr(found, name), getattr(expected, name)
        assert (value is None) is (reference is None)
        if value is not None:
            torch.testing.assert_close(value.double(), reference, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(
                getattr(without_gradient, name).double(), reference, rtol=tolerance, atol=tolerance
            )
    error = (found.gradient.double() - expected.gradient).norm(dim=0) / expected.gradient.norm(dim=0)
    assert error.max() < gradient_tolerance, error


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_values_and_gradients_are_those_of_float64(divergence, head):
    check(make_problem(divergence, dtype=torch.float32, head=head), tolerance=2e-6, gradient_tolerance=2e-6)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_large_logits_keep_their_digits(kind):
    problem = make_problem(Divergence(kind=kind), dtype=torch.float32, size=30.0)
    # logits of about 100, of which float32 keeps 1e-5
    check(problem, tolerance=1e-4, gradient_tolerance=1e-4)


def test_the_teacher_may_have_a_head_of_its_own():
    problem = make_problem(Divergence(), dtype=torch.float32, own_teacher_head=True)
    check(problem, tolerance=2e-6, gradient_tolerance=2e-6)


def test_a_divergence_may_stand_alone():
    problem = make_problem(Divergence(), dtype=torch.float32, with_labels=False)
    check(problem, tolerance=2e-6, gradient_tolerance=2e-6)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("divergence", list(DIVERGENCES.values())[1:], ids=list(DIVERGENCES)[1:])
def test_the_top_k_of_a_teacher_may_stand_for_it(divergence, head):
    problem = make_problem(None, dtype=torch.float32, head=head)
    logprobs = normal(TOKENS, VOCAB, seed=6).mul(3).log_softmax(-1)
    ids = logprobs.topk(7).indices
    ids[1, 3] = VOCAB - 1  # the label is among them, and at its other end
    given = {"topk_ids": ids.to(DEVICE), "topk_logprobs": logprobs.gather(1, ids).float().to(DEVICE)}
    problem["targets"] = replace(problem["targets"], divergence=divergence, **given)
    check(problem, tolerance=5e-6, gradient_tolerance=2e-6)


@pytest.mark.skipif(DEVICE == "cpu", reason="torch multiplies bfloat16 into float32 on a GPU alone")
def test_bfloat16_is_rounded_once():
    check(make_problem(Divergence(), dtype=torch.bfloat16), tolerance=1e-5, gradient_tolerance=2**-8)


def test_a_trained_weight_gets_its_gradient_from_losses_that_are_summed_up(monkeypatch):
    from distill import gpu_blocks

    def kernels(rows, head, targets, weights, **_):
        return gpu_blocks.block_losses(rows, head=head, targets=targets, weights=weights)

    gradients = []
    for run, dtype in ((kernels, torch.float32), (linear_losses._block_losses, torch.float64)):
        monkeypatch.setattr(linear_losses, "_block_losses", run)
        problem = make_problem(None, dtype=torch.float32)
        rows, weight = (one.to(dtype).requires_grad_() for one in (problem["rows"], problem["head"].weight))
        # autograd hands down one value for all tokens
        linear_ce(rows, weight=weight, labels=problem["targets"].labels).sum().backward()
        gradients.append((rows.grad.double(), weight.grad.double()))
    for found, expected in zip(*gradients, strict=True):
        assert (found - expected).norm() < 2e-6 * expected.norm()
