import math

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill.losses import (
    ChunkSizes,
    feature_mse,
    forward_kl,
    jensen_shannon,
    linear_ce,
    linear_ce_kl,
    reverse_kl,
    topk_forward_kl,
)
from distill.refusals import all_finite

HEADS = {
    "plain": {},
    "scale": {"logit_scale": 0.25},
    "softcap": {"logit_softcap": 5.0},
    "scale and softcap": {"logit_scale": 1.7, "logit_softcap": 5.0},
}
# tokens, vocabulary, hidden, scale of the rows
REGIMES = {
    "random": (13, 37, 6, 1.0),
    "tiny": (5, 11, 3, 1.0),
    "saturated": (9, 37, 6, 300.0),
    "wide vocabulary": (5, 5003, 4, 1.0),
    "one row": (1, 37, 6, 1.0),
    "zero rows": (0, 37, 6, 1.0),
    "chunks divide evenly": (8, 32, 6, 1.0),
}
CHUNKS = ChunkSizes(rows=4, vocab=8)


def make_inputs(regime, *, dtype=torch.float64, seed=0):
    tokens, vocab, hidden, size = REGIMES[regime]
    generator = torch.Generator().manual_seed(seed)
    rows, teacher_rows, weight, bias = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((tokens, hidden), (tokens, hidden), (vocab, hidden), (vocab,))
    )
    labels = torch.randint(vocab, (tokens,), generator=generator)
    return {
        "rows": (size * rows).to(dtype),
        "teacher_rows": (size * teacher_rows).to(dtype),
        "weight": weight.to(dtype),
        "bias": bias.to(dtype),
        "labels": labels,
    }


def dense_logits(rows, weight, bias, logit_scale=1.0, logit_softcap=None):
    logits = logit_scale * (rows @ weight.T + (0 if bias is None else bias))
    return logits if logit_softcap is None else logit_softcap * torch.tanh(logits / logit_softcap)


def dense_ce_kl(rows, *, teacher_rows, weight, bias, labels, **head):
    logits = dense_logits(rows, weight, bias, **head)
    log_q = logits.log_softmax(-1)
    log_p = dense_logits(teacher_rows, weight, bias, **head).log_softmax(-1)
    return -log_q.gather(1, labels[:, None])[:, 0], (log_p.exp() * (log_p - log_q)).sum(-1)


def to_double(inputs):
    return {name: value if name == "labels" else value.double() for name, value in inputs.items()}


def values_and_gradient(function, inputs, head, **options):
    """Losses and the gradient of an arbitrary weighting of both, as a trainer would form it."""
    rows = inputs["rows"].detach().clone().requires_grad_()
    ce_loss, kl_loss = function(rows, **{k: v for k, v in inputs.items() if k != "rows"}, **head, **options)
    generator = torch.Generator().manual_seed(7)
    ce_weights, kl_weights = torch.randn(2, len(rows), dtype=torch.float64, generator=generator).to(rows.device)
    ((ce_weights * ce_loss).sum() + (kl_weights * kl_loss).sum()).backward()
    return ce_loss.detach(), kl_loss.detach(), rows.grad


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("regime", REGIMES)
def test_linear_ce_kl_equals_the_dense_reference(regime, head):
    inputs = make_inputs(regime)
    expected = values_and_gradient(dense_ce_kl, inputs, head)
    found = values_and_gradient(linear_ce_kl, inputs, head, chunks=CHUNKS)
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("regime", REGIMES)
def test_linear_ce_kl_in_float32_stays_near_float64(regime, head):
    inputs = make_inputs(regime, dtype=torch.float32)
    expected = values_and_gradient(dense_ce_kl, to_double(inputs), head)
    found = values_and_gradient(linear_ce_kl, inputs, head, chunks=CHUNKS)
    # Logits reach a few thousand when saturated; float32 keeps 7 digits of those.
    bound = 2e-3 if regime == "saturated" else 2e-5
    for value, reference in zip(found, expected, strict=True):
        assert value.dtype is torch.float32
        torch.testing.assert_close(value.double(), reference, rtol=1e-4, atol=bound)


def test_linear_ce_kl_in_bf16_accumulates_in_float32():
    inputs = make_inputs("wide vocabulary", dtype=torch.bfloat16)
    expected = values_and_gradient(dense_ce_kl, to_double(inputs), {})
    found = values_and_gradient(linear_ce_kl, inputs, {}, chunks=CHUNKS)
    assert found[0].dtype is found[1].dtype is torch.float32
    assert found[2].dtype is torch.bfloat16
    for value, reference in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-5)
    # The gradient is rounded once, at the end: half a unit in bf16's 8 significant bits.
    torch.testing.assert_close(found[2].double(), expected[2], rtol=2**-8, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_linear_ce_kl_in_bf16_on_the_gpu():
    inputs = make_inputs("wide vocabulary", dtype=torch.bfloat16)
    expected = values_and_gradient(dense_ce_kl, to_double(inputs), {})
    on_gpu = {name: value.cuda() for name, value in inputs.items()}
    found = values_and_gradient(linear_ce_kl, on_gpu, {}, chunks=CHUNKS)
    for value, reference in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(value.double().cpu(), reference, rtol=1e-4, atol=1e-4)
    # Softmax differences are rounded to bf16 before the product with the weight.
    torch.testing.assert_close(found[2].double().cpu(), expected[2], rtol=2**-6, atol=2**-6)


def test_autocast_does_not_lower_the_precision():
    inputs = make_inputs("random", dtype=torch.float32)
    plain = values_and_gradient(linear_ce_kl, inputs, {})
    with torch.autocast("cpu", torch.bfloat16):
        autocast = values_and_gradient(linear_ce_kl, inputs, {})
    for value, reference in zip(autocast, plain, strict=True):
        assert torch.equal(value, reference)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_linear_ce_kl_passes_gradcheck(head):
    inputs = make_inputs("tiny")
    rows = inputs.pop("rows").requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: linear_ce_kl(rows, **inputs, **head, chunks=CHUNKS), (rows,))


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_ce_passes_gradcheck_for_rows_weight_and_bias(head, with_bias):
    inputs = make_inputs("tiny")
    rows, weight, bias = (inputs[name].requires_grad_() for name in ("rows", "weight", "bias"))

    def loss(rows, weight, bias):
        bias = bias if with_bias else None
        return linear_ce(rows, weight=weight, bias=bias, labels=inputs["labels"], **head, chunks=CHUNKS)

    assert torch.autograd.gradcheck(loss, (rows, weight, bias) if with_bias else (rows, weight, None))


@pytest.mark.parametrize("regime", REGIMES)
def test_linear_ce_equals_the_dense_reference(regime):
    inputs = make_inputs(regime)
    leaves = [inputs[name].requires_grad_() for name in ("rows", "weight")]
    found = linear_ce(leaves[0], weight=leaves[1], labels=inputs["labels"], chunks=CHUNKS)
    expected = functional.cross_entropy(leaves[0] @ leaves[1].T, inputs["labels"], reduction="none")
    weights = torch.randn(len(found), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for gradient, reference in zip(
        torch.autograd.grad(found @ weights, leaves), torch.autograd.grad(expected @ weights, leaves), strict=True
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-9)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return output


def test_no_tensor_of_tokens_times_vocabulary_is_made():
    tokens, vocab, hidden = 64, 4096, 8
    rows = torch.randn(tokens, hidden, requires_grad=True)
    weight, labels = torch.randn(vocab, hidden), torch.randint(vocab, (tokens,))
    teacher_rows = torch.randn(tokens, hidden)
    with LargestTensor() as dense:
        sum(dense_ce_kl(rows, teacher_rows=teacher_rows, weight=weight, bias=None, labels=labels)).sum().backward()
    assert dense.elements == tokens * vocab
    chunks = ChunkSizes(rows=16, vocab=512)
    with LargestTensor() as chunked:
        losses = linear_ce_kl(rows, teacher_rows=teacher_rows, weight=weight, labels=labels, chunks=chunks)
        (losses.ce_loss + losses.kl_loss).sum().backward()
        linear_ce(rows, weight=weight.requires_grad_(), labels=labels, chunks=chunks).sum().backward()
    # the logits of one block, both sides
    assert chunked.elements <= 2 * chunks.rows * vocab < tokens * vocab


def test_kl_of_equal_rows_is_zero_with_zero_gradient():
    inputs = make_inputs("random", dtype=torch.float32)
    rows = inputs["rows"].requires_grad_()
    losses = linear_ce_kl(
        rows, teacher_rows=rows.detach(), weight=inputs["weight"], labels=inputs["labels"], chunks=CHUNKS
    )
    torch.testing.assert_close(losses.kl_loss, torch.zeros(13), rtol=0, atol=1e-5)
    losses.kl_loss.sum().backward()
    assert rows.grad.abs().max() == 0


def test_frozen_inputs_and_labels_are_checked():
    inputs = make_inputs("random")
    rows = inputs.pop("rows")
    with pytest.raises(ValueError, match="frozen"):
        linear_ce_kl(rows, **inputs | {"weight": inputs["weight"].clone().requires_grad_()})
    with pytest.raises(ValueError, match=r"expected 0\.\.36, found -100"):
        linear_ce(rows, weight=inputs["weight"], labels=torch.full((13,), -100))
    with pytest.raises(ValueError, match="at least 1"):
        ChunkSizes(rows=0)


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    return tuple((3 * torch.randn(7, 11, dtype=torch.float64, generator=generator)).requires_grad_() for _ in range(2))


def test_dense_divergences_equal_their_definitions(logits):
    student, teacher = logits
    q, p = student.softmax(-1), teacher.softmax(-1)

    def kl(a, b):
        return torch.distributions.kl_divergence(
            torch.distributions.Categorical(probs=a), torch.distributions.Categorical(probs=b)
        )

    torch.testing.assert_close(forward_kl(student, teacher), kl(p, q))
    torch.testing.assert_close(reverse_kl(student, teacher), kl(q, p))
    for beta in (0.1, 0.5):
        mixture = beta * p + (1 - beta) * q
        expected = beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)
        torch.testing.assert_close(jensen_shannon(student, teacher, beta=beta), expected)
    assert jensen_shannon(1e4 * student, -1e4 * student).max() <= math.log(2) + 1e-12
    with pytest.raises(ValueError, match="0 < beta < 1"):
        jensen_shannon(student, teacher, beta=1.0)


@pytest.mark.parametrize("loss", [forward_kl, reverse_kl, jensen_shannon])
def test_dense_divergences_vanish_at_equality_pass_gradcheck_and_stand_masked_entries(loss, logits):
    student, teacher = logits
    torch.testing.assert_close(loss(student, student), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(loss, (student, teacher))
    masked = torch.zeros(11, dtype=torch.float64)
    masked[4] = -torch.inf
    masked_loss = loss(student + masked, teacher + masked)
    keep = [column for column in range(11) if column != 4]
    torch.testing.assert_close(masked_loss, loss(student[:, keep], teacher[:, keep]))
    (gradient,) = torch.autograd.grad(masked_loss.sum(), student)
    assert gradient.isfinite().all()


def test_dense_divergences_keep_leading_axes_and_compute_in_float32(logits):
    student, teacher = (x.detach().to(torch.bfloat16).unflatten(0, (7, 1)) for x in logits)
    loss = forward_kl(student, teacher)
    assert loss.shape == (7, 1)
    assert loss.dtype is torch.float32


def test_topk_forward_kl_is_the_kl_of_the_bucketed_distributions(logits):
    student, teacher = logits
    top = teacher.log_softmax(-1).topk(4)
    q, p = student.softmax(-1), teacher.softmax(-1)
    expected = torch.zeros(7, dtype=torch.float64)
    for row in range(7):
        ids = top.indices[row]
        p_all = torch.cat([p[row, ids], 1 - p[row, ids].sum()[None]])
        q_all = torch.cat([q[row, ids], 1 - q[row, ids].sum()[None]])
        expected[row] = (p_all * (p_all / q_all).log()).sum()
    found = topk_forward_kl(student, top.indices, top.values)
    torch.testing.assert_close(found, expected)
    assert (found <= forward_kl(student, teacher) + 1e-12).all()
    assert torch.autograd.gradcheck(
        lambda x: topk_forward_kl(x, top.indices, top.values.detach()), (student,), check_undefined_grad=False
    )


def test_topk_forward_kl_with_the_whole_vocabulary_is_forward_kl(logits):
    student, teacher = logits
    top = teacher.log_softmax(-1).topk(11)
    torch.testing.assert_close(topk_forward_kl(student, top.indices, top.values), forward_kl(student, teacher))


def test_topk_forward_kl_stands_a_teacher_without_tail():
    student = torch.randn(2, 5, requires_grad=True)
    loss = topk_forward_kl(student, torch.tensor([[1], [3]]), torch.zeros(2, 1))
    torch.testing.assert_close(loss, functional.cross_entropy(student, torch.tensor([1, 3]), reduction="none"))
    loss.sum().backward()
    assert student.grad.isfinite().all()


def test_feature_mse_is_a_mean_over_the_hidden_axis():
    rows = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    torch.testing.assert_close(feature_mse(rows, torch.zeros(2, 2)), torch.tensor([5.0, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_value_that_is_not_finite_is_seen_anywhere(dtype: torch.dtype) -> None:
    rows = torch.full((7, 33), torch.finfo(dtype).max, dtype=dtype)  # whose sum would overflow
    assert all_finite(rows)
    assert all_finite(rows[:0])
    for bad in (math.nan, math.inf, -math.inf):
        for place in range(rows.numel()):
            changed = rows.clone()
            changed.view(-1)[place] = bad
            assert not all_finite(changed)
