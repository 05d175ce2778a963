"""What the kernels of the losses are given: on a CPU, without Triton, with recorders in their place."""

import sys
from types import SimpleNamespace

import pytest
import torch

from distill import linear_losses
from distill.chunked_losses import linear_ce, linear_ce_kl
from distill.divergences import Divergence


class Recorder:
    """Stands for a kernel; keeps the tensors that it is launched with."""

    def __init__(self):
        self.tensors = []

    def __getitem__(self, grid):
        def launch(*arguments, **_):
            self.tensors += [one for one in arguments if isinstance(one, torch.Tensor)]

        return launch


@pytest.fixture
def kernels(monkeypatch):
    """The driver of the kernels, with recorders."""
    language = SimpleNamespace(constexpr=int)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(jit=lambda kernel: kernel, language=language))
    monkeypatch.setitem(sys.modules, "triton.language", language)
    for name in ("distill.loss_kernels", "distill.gpu_blocks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    from distill import gpu_blocks

    for name in ("normalizer_kernel", "terms_kernel"):
        monkeypatch.setattr(gpu_blocks, name, Recorder())
    monkeypatch.setattr(
        linear_losses,
        "_block_losses",
        lambda rows, head, targets, weights, **_: gpu_blocks.block_losses(
            rows, head=head, targets=targets, weights=weights
        ),
    )
    yield gpu_blocks
    for name in ("distill.loss_kernels", "distill.gpu_blocks"):
        sys.modules.pop(name, None)


def every_other_row(*shape):
    return torch.randn(2 * shape[0], *shape[1:])[::2]


@pytest.mark.parametrize("kind", ["none", "forward_kl", "reverse_kl", "topk"])
def test_every_tensor_is_contiguous(kernels, kind):
    rows, weight = every_other_row(6, 4).requires_grad_(), every_other_row(9, 4)
    labels = torch.arange(12)[::2].clamp(max=8)
    if kind == "none":
        linear_ce(rows, weight=weight.requires_grad_(), labels=labels).sum().backward()
    elif kind == "topk":
        topk = torch.randn(6, 9).log_softmax(-1).topk(3)
        losses = linear_ce_kl(
            rows, weight=weight, labels=labels, topk_ids=topk.indices, topk_logprobs=topk.values, kl_weight=2.0
        )
        (losses.ce_loss.sum() + 3 * losses.kl_loss.sum()).backward()
    else:
        losses = linear_ce_kl(
            rows, weight=weight, labels=labels, teacher_rows=every_other_row(6, 4), divergence=Divergence(kind=kind)
        )
        (losses.ce_loss.sum() + 3 * losses.kl_loss.sum()).backward()
    for kernel in (kernels.normalizer_kernel, kernels.terms_kernel):
        assert len(kernel.tensors) > 3
        assert all(tensor.is_contiguous() for tensor in kernel.tensors), [one.stride() for one in kernel.tensors]
