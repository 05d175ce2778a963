import pytest
import torch

from distill.uld import align_spans, topk_uld_loss, uld_loss


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    return tuple((3 * torch.randn(7, 11, dtype=torch.float64, generator=generator)).requires_grad_() for _ in range(2))


def test_uld_pads_the_smaller_vocabulary_and_ignores_order():
    student = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.1, 0.5, 0.1, 0.3]], dtype=torch.float64).log()
    expected = torch.tensor([0.2 + 0.1 + 0.0 + 0.1], dtype=torch.float64)
    torch.testing.assert_close(uld_loss(student, teacher), expected)
    torch.testing.assert_close(uld_loss(teacher, student), expected)
    torch.testing.assert_close(uld_loss(student[:, [2, 0, 1]], teacher), expected)


def test_topk_uld_bounds_the_full_loss_from_below(logits):
    student, teacher = logits
    wide_student = torch.cat([student, student.flip(0)], dim=-1)
    logprobs = teacher.log_softmax(-1)
    full = uld_loss(wide_student, teacher)
    for k in (2, 5):
        assert (topk_uld_loss(wide_student, logprobs.topk(k).values) <= full + 1e-12).all()
    torch.testing.assert_close(topk_uld_loss(wide_student, logprobs.topk(11).values), full)


@pytest.mark.parametrize("loss", [uld_loss, lambda s, t: topk_uld_loss(s, t.log_softmax(-1).topk(3).values)])
def test_uld_passes_gradcheck(loss, logits):
    student, teacher = logits
    teacher = teacher.detach()
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), (student,))


def test_align_spans_truncates_to_the_shorter_span_per_turn():
    aligned = align_spans([2, 3, 1], [3, 1, 1])
    assert aligned.student.tolist() == [0, 1, 2, 5]
    assert aligned.teacher.tolist() == [0, 1, 3, 4]
    assert align_spans([], []).student.tolist() == []
