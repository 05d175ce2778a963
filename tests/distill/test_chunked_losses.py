"""Losses through a head against dense float64 references: every divergence, teacher, head and weighting."""

import inspect
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill import linear_losses
from distill.losses import (
    ChunkSizes,
    Divergence,
    LinearHead,
    feature_mse,
    linear_ce,
    linear_ce_kl,
    linear_divergence,
    weighted_ce_kl,
)
from distill.regularization import regularization_loss
from distill.teacher_terms import Targets

DIVERGENCES = {
    "forward": Divergence(),
    "reverse": Divergence(kind="reverse_kl"),
    "jensen-shannon": Divergence(kind="jensen_shannon", beta=0.3),
    "forward, tempered": Divergence(temperature=2.0),
    "reverse, tempered": Divergence(kind="reverse_kl", temperature=0.5),
    "jensen-shannon, tempered": Divergence(kind="jensen_shannon", temperature=3.0),
}
HEADS = {"plain": {}, "scale and softcap": {"logit_scale": 1.7, "logit_softcap": 5.0}}
TEACHERS = ("rows", "own head", "topk")
CHUNKS = ChunkSizes(rows=4, vocab=8)


def make_inputs(teacher, *, tokens=13, vocab=37, hidden=6, size=1.0, dtype=torch.float64, seed=0, k=5):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    inputs = {
        "rows": (size * normal(tokens, hidden)).to(dtype),
        "weight": normal(vocab, hidden).to(dtype),
        "bias": normal(vocab).to(dtype),
        "labels": torch.randint(vocab, (tokens,), generator=generator),
    }
    if teacher == "topk":
        top = normal(tokens, vocab).log_softmax(-1).topk(k)
        return inputs | {"topk_ids": top.indices, "topk_logprobs": top.values.to(dtype)}
    width = hidden + 3 if teacher == "own head" else hidden
    inputs["teacher_rows"] = (size * normal(tokens, width)).to(dtype)
    if teacher == "own head":
        inputs["teacher_head"] = LinearHead(weight=normal(vocab, width).to(dtype), logit_softcap=3.0)
    return inputs


def to_double(inputs):
    changed = {
        name: value.double() for name, value in inputs.items() if name not in ("labels", "topk_ids", "teacher_head")
    }
    return inputs | changed


def dense_logits(rows, weight, bias=None, logit_scale=1.0, logit_softcap=None):
    logits = logit_scale * functional.linear(rows, weight, bias)
    return logits if logit_softcap is None else logit_softcap * torch.tanh(logits / logit_softcap)


def dense_divergence(log_q, log_p, divergence):
    def kl(log_a, log_b):
        return torch.where(log_a > -torch.inf, log_a.exp() * (log_a - log_b), 0).sum(-1)

    if divergence.kind == "forward_kl":
        return kl(log_p, log_q)
    if divergence.kind == "reverse_kl":
        return kl(log_q, log_p)
    beta = divergence.beta
    log_m = torch.stack([log_p + math.log(beta), log_q + math.log(1 - beta)]).logsumexp(0)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def bucketed(logits, ids):
    """The top-k entries, and the rest as one."""
    log_q = logits.log_softmax(-1)
    rest = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_q.gather(-1, ids), rest], -1)


def dense_losses(rows, *, weight, labels, bias, divergence, head, **teacher):
    logits = dense_logits(rows, weight, bias, **head)
    ce = -logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    if "topk_ids" in teacher:
        topk = teacher["topk_logprobs"]
        teacher_logits = torch.cat([topk, (1 - topk.exp().sum(-1, keepdim=True)).log()], -1)
        student_logits = bucketed(logits, teacher["topk_ids"])
        if topk.shape[-1] == logits.shape[-1]:
            teacher_logits, student_logits = topk, student_logits[:, :-1]
        return ce, tempered_divergence(student_logits, teacher_logits, divergence)
    own = teacher.get("teacher_head")
    if own is None:
        teacher_logits = dense_logits(teacher["teacher_rows"], weight, bias, **head)
    else:
        teacher_logits = dense_logits(teacher["teacher_rows"], own.weight, own.bias, own.logit_scale, own.logit_softcap)
    return ce, tempered_divergence(logits, teacher_logits, divergence)


def tempered_divergence(student_logits, teacher_logits, divergence):
    log_q, log_p = ((one / divergence.temperature).log_softmax(-1) for one in (student_logits, teacher_logits))
    return dense_divergence(log_q, log_p, divergence)


def chunked_losses(rows, *, divergence, head, chunks=CHUNKS, **inputs):
    return linear_ce_kl(rows, **inputs, **head, divergence=divergence, chunks=chunks)


def values_and_gradient(function, inputs, weights, **options):
    rows = inputs["rows"].detach().clone().requires_grad_()
    ce, kl = function(rows, **{name: value for name, value in inputs.items() if name != "rows"}, **options)
    ce_weights, kl_weights = (weight.to(ce.dtype) for weight in weights)
    ((ce_weights * ce).sum() + (kl_weights * kl).sum()).backward()
    return ce.detach(), kl.detach(), rows.grad


def random_weights(tokens, seed=7):
    return torch.randn(2, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_every_divergence_teacher_and_head_equals_its_definition(teacher, divergence, head):
    inputs, weights = make_inputs(teacher), random_weights(13)
    expected = values_and_gradient(dense_losses, inputs, weights, divergence=divergence, head=head)
    found = values_and_gradient(chunked_losses, inputs, weights, divergence=divergence, head=head)
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_divergence_alone_passes_gradcheck(teacher, divergence):
    inputs = make_inputs(teacher, tokens=5, vocab=11)
    rows = inputs.pop("rows").requires_grad_()
    del inputs["labels"]
    assert torch.autograd.gradcheck(
        lambda rows: linear_divergence(rows, **inputs, divergence=divergence, chunks=CHUNKS), (rows,)
    )


# tokens, vocabulary, hidden, scale of the rows
REGIMES = {
    "random": (33, 997, 64, 0.3),
    "saturated": (33, 997, 64, 300.0),
    "wide vocabulary": (9, 50_021, 32, 0.3),
    "one row": (1, 997, 64, 0.3),
}


@pytest.mark.parametrize("kl_weight", [1.0, 0.3])
@pytest.mark.parametrize("regime", REGIMES)
def test_float32_is_within_1e_6_of_float64(regime, kl_weight):
    tokens, vocab, hidden, size = REGIMES[regime]
    inputs = make_inputs("rows", tokens=tokens, vocab=vocab, hidden=hidden, size=size, dtype=torch.float32)
    ones = torch.ones(tokens)
    weights, options = (ones, kl_weight * ones), {"divergence": Divergence(), "head": {}}
    chunks = ChunkSizes(rows=8, vocab=256)
    expected = values_and_gradient(dense_losses, to_double(inputs), weights, **options)
    found = values_and_gradient(chunked_losses, inputs, weights, **options, kl_weight=kl_weight, chunks=chunks)
    for value, reference in zip(found, expected, strict=True):
        assert value.dtype is torch.float32
        assert relative_error(value, reference) < 1e-6


def test_bf16_values_are_exact_and_the_gradient_is_rounded_once():
    inputs = make_inputs("rows", tokens=33, vocab=997, hidden=64, size=0.3, dtype=torch.bfloat16)
    weights = random_weights(33)
    options = {"divergence": Divergence(), "head": {}}
    expected = values_and_gradient(dense_losses, to_double(inputs), weights, **options)
    found = values_and_gradient(chunked_losses, inputs, weights, **options)
    assert relative_error(found[0], expected[0]) < 1e-6
    assert relative_error(found[1], expected[1]) < 1e-6
    assert found[2].dtype is torch.bfloat16
    assert relative_error(found[2], expected[2]) < 2**-8


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_chunk_sizes_and_masked_rows_change_nothing(data):
    tokens, vocab = data.draw(st.integers(0, 9)), data.draw(st.integers(2, 23))
    teacher = data.draw(st.sampled_from(TEACHERS))
    divergence = data.draw(st.sampled_from(list(DIVERGENCES.values())))
    head = data.draw(st.sampled_from(list(HEADS.values())))
    chunks = ChunkSizes(rows=data.draw(st.integers(1, 11)), vocab=data.draw(st.integers(1, 25)))
    k = data.draw(st.integers(1, vocab))
    inputs = make_inputs(teacher, tokens=tokens, vocab=vocab, hidden=3, k=k, seed=data.draw(st.integers(0, 9)))
    ce_mask, kl_mask = (
        torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 1.0, -0.7]), min_size=tokens, max_size=tokens)))
        for _ in range(2)
    )
    options = {"divergence": divergence, "head": head}
    found = values_and_gradient(chunked_losses, inputs, (ce_mask, kl_mask), **options, chunks=chunks)
    whole = ChunkSizes(rows=100, vocab=100)
    expected = values_and_gradient(chunked_losses, inputs, (ce_mask, kl_mask), **options, chunks=whole)
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-9, atol=1e-9)
    assert found[2][(ce_mask == 0) & (kl_mask == 0)].abs().sum() == 0


def test_topk_of_the_whole_vocabulary_is_the_full_divergence():
    inputs = make_inputs("rows")
    logprobs = dense_logits(inputs["teacher_rows"], inputs["weight"], inputs["bias"]).log_softmax(-1).topk(37)
    teacher_rows = inputs.pop("teacher_rows")
    for divergence in DIVERGENCES.values():
        full = linear_ce_kl(**inputs, teacher_rows=teacher_rows, divergence=divergence).kl_loss
        topk = linear_ce_kl(
            **inputs, topk_ids=logprobs.indices, topk_logprobs=logprobs.values, divergence=divergence
        ).kl_loss
        torch.testing.assert_close(topk, full)


def test_topk_stands_a_tail_without_mass_on_either_side():
    rows = torch.eye(2, dtype=torch.float64)[:1].mul(1e4).requires_grad_()
    weight = torch.eye(5, 2, dtype=torch.float64)
    for divergence in DIVERGENCES.values():
        loss = linear_divergence(
            rows,
            weight=weight,
            topk_ids=torch.tensor([[0, 1]]),
            topk_logprobs=torch.tensor([[math.log(0.5), math.log(0.5)]]),
            divergence=divergence,
        )
        (gradient,) = torch.autograd.grad(loss.sum(), rows)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()


def test_both_terms_of_one_weight_are_computed_once_and_others_where_they_differ():
    inputs = make_inputs("rows")
    ones = torch.ones(13, dtype=torch.float64)
    differing = ones.clone()
    differing[[3, 8]] = 2.0
    products = {}
    for name, weights in {"equal": (ones, ones), "differing": (ones, differing)}.items():
        with Products() as counted:
            values_and_gradient(chunked_losses, inputs, weights, divergence=Divergence(), head={}, chunks=ChunkSizes())
        products[name] = counted.flops
    dense = 3 * 13 * 37 * 6
    assert products["equal"] == dense
    assert products["differing"] == dense * (13 + 2) / 13


@pytest.mark.parametrize("term_weights", [(1.0, 1.0), (0.7, 0.3), (0.0, 0.5), (2.0, 0.0)])
def test_a_weighted_sum_is_computed_once_whatever_the_weights(term_weights):
    inputs = make_inputs("rows")
    (token_weights, _), (ce_weight, kl_weight) = random_weights(13), term_weights
    expected = values_and_gradient(
        dense_losses, inputs, [one * token_weights for one in term_weights], divergence=Divergence(), head={}
    )
    rows = inputs["rows"].clone().requires_grad_()
    with Products() as counted:
        found = weighted_ce_kl(
            rows,
            teacher_rows=inputs["teacher_rows"],
            head=LinearHead(weight=inputs["weight"], bias=inputs["bias"]),
            labels=inputs["labels"],
            ce_weight=ce_weight,
            kl_weight=kl_weight,
            chunks=CHUNKS,
        )
        (found.loss * token_weights).sum().backward()
    assert counted.flops == 3 * 13 * 37 * 6
    for value, reference in zip((found.ce_loss, found.kl_loss, rows.grad), expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.loss, ce_weight * expected[0] + kl_weight * expected[1])
    assert not found.ce_loss.requires_grad
    assert not found.kl_loss.requires_grad


def test_a_trained_weights_gradient_is_added_to_from_the_second_block_on():
    """One onto zeros would first make a whole product, as large as the gradient, where there is but one block."""
    inputs = make_inputs("rows")
    rows, weight = inputs["rows"], inputs["weight"].requires_grad_()
    for chunks, blocks in ((ChunkSizes(), 1), (ChunkSizes(rows=8), 2)):
        loss = linear_ce(rows, weight=weight, labels=inputs["labels"], chunks=chunks).sum()
        with Operations(weight.shape) as made:
            loss.backward()
        assert made.names.count("addmm_") == blocks - 1
        assert "zeros_like" not in made.names


class Operations(TorchDispatchMode):
    """Names of the operations that return a tensor of some shape."""

    def __init__(self, shape):
        super().__init__()
        self.names, self._shape = [], shape

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.shape == self._shape:
            self.names.append(func._overloadpacket.__name__)
        return output


class Products(TorchDispatchMode):
    """Multiplications in all matrix products."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_, torch.ops.aten.addmm):
            left, right = args[-2:]
            self.flops += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


class LiveElements(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return output


@pytest.mark.parametrize("teacher", TEACHERS)
def test_memory_does_not_grow_with_tokens_times_vocabulary(teacher):
    largest, saved = {}, {}
    for tokens in (64, 256):
        inputs = make_inputs(teacher, tokens=tokens, vocab=512, hidden=4, dtype=torch.float32)
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        rows = inputs.pop("rows").requires_grad_()
        with LiveElements() as live, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = linear_ce_kl(rows, **inputs, chunks=ChunkSizes(rows=16, vocab=64))
            (losses.ce_loss + losses.kl_loss).sum().backward()
        largest[tokens], saved[tokens] = live.largest, max(sizes)
    assert largest[64] == largest[256] <= 2 * 16 * 512
    assert saved[256] <= max(256 * 4, 512 * 4)


def test_default_blocks_hold_few_rows():
    inputs = make_inputs("rows", tokens=512, vocab=700, hidden=4, dtype=torch.float32)
    with LiveElements() as live:
        linear_ce_kl(**inputs)
    assert live.largest <= 2 * 64 * 700
    blocks = list(ChunkSizes().blocks(inputs["rows"]))
    assert [block.stop - block.start for block in blocks] == [64] * 8


def test_forms_of_the_regularization():
    inputs = make_inputs("rows")
    head = LinearHead(weight=inputs["weight"], bias=inputs["bias"], logit_softcap=5.0)
    options = {"divergence": Divergence(), "head": {"logit_softcap": 5.0}}
    ce, kl = dense_losses(inputs.pop("rows").requires_grad_(), **inputs, **options)
    rows = make_inputs("rows")["rows"].requires_grad_()
    expected = {
        "none": torch.zeros(13, dtype=torch.float64),
        "feature_mse": feature_mse(rows, inputs["teacher_rows"]),
        "kl": kl,
        "ce": ce,
        "ce_kl": ce + kl,
    }
    for form, reference in expected.items():
        found = regularization_loss(
            form, rows, teacher_rows=inputs["teacher_rows"], head=head, labels=inputs["labels"], chunks=CHUNKS
        )
        torch.testing.assert_close(found, reference)
        assert found.requires_grad == (form != "none")


# what is changed, and what the error has to say
BAD_INPUTS = {
    "label too large": ({"labels": [1, 2, 40]}, r"expected 0\.\.36, found 40 \(row 2 of \[3\], sample c; 1 such row\)"),
    "label of a masked token": ({"labels": [-100, 2, -100]}, r"found -100 \(row 0 of \[3\], sample a; 2 such rows\)"),
    "fewer labels": (
        {"labels": [1, 2]},
        r"labels and rows differ in length: expected 3 .*found 2 .*labels \[2\].*weight \[37, 6\]; samples a, b, c\)",
    ),
    "fewer teacher rows": ({"teacher_rows": torch.zeros(2, 6)}, r"teacher_rows and rows differ.*teacher_rows \[2, 6\]"),
    "head of another width": (
        {"weight": torch.zeros(37, 7)},
        r"\[37, 7\] expects 7 columns, found 6 .*samples a, b, c",
    ),
    "NaN row": (
        {"rows": float("nan")},
        r"rows not finite: .*found nan in 1 of 6 columns \(row 1 of \[3, 6\], sample b;",
    ),
    "infinite teacher row": ({"teacher_rows": float("inf")}, r"teacher_rows not finite: .*found inf.*sample b"),
    "ids beyond the head": (
        {"topk_ids": [[1], [37], [2]], "topk_logprobs": torch.zeros(3, 1)},
        r"topk_ids.*37.*sample b",
    ),
    "probabilities for logs": (
        {"topk_ids": [[1]] * 3, "topk_logprobs": torch.ones(3, 1)},
        "at most 0, found .*sample a",
    ),
    "topk without values": ({"topk_ids": [[1]] * 3}, "belong together"),
    "no teacher": ({"teacher_rows": None}, "found neither"),
    "two teachers": ({"topk_ids": [[1]] * 3, "topk_logprobs": torch.zeros(3, 1), "keep": True}, "found both"),
    "another vocabulary": ({"teacher_head": LinearHead(weight=torch.zeros(36, 6))}, "has 37 entries, the teacher's 36"),
    "trained teacher": ({"weight": torch.zeros(37, 6, requires_grad=True)}, "frozen"),
    "fewer sample ids": ({"sample_ids": ["a"]}, "expected 3, found"),
}


@pytest.mark.parametrize("change", BAD_INPUTS)
def test_bad_inputs_are_refused_with_shapes_and_sample(change):
    changed, message = BAD_INPUTS[change]
    inputs = make_inputs("rows", tokens=3, dtype=torch.float32) | {"sample_ids": ["a", "b", "c"]}
    for name, value in changed.items():
        if isinstance(value, float):
            inputs[name] = inputs[name].clone()
            inputs[name][1, 4] = value
        elif isinstance(value, list) and name != "sample_ids":
            inputs[name] = torch.tensor(value)
        else:
            inputs[name] = value
    if "topk_ids" in inputs and not inputs.pop("keep", False):
        del inputs["teacher_rows"]
    # as users call it: the suite's own shape checker would speak first
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(linear_ce_kl)(**inputs)


def test_settings_are_checked():
    for wrong in ({"beta": 0.0}, {"beta": 1.0}, {"temperature": 0.0}, {"temperature": math.inf}):
        with pytest.raises(ValueError, match="divergence needs"):
            Divergence(**wrong)
    for rows, vocab in itertools.product((0, 4), (0, 8)):
        if rows == 0 or vocab == 0:
            with pytest.raises(ValueError, match="at least 1"):
                ChunkSizes(rows=rows, vocab=vocab)


def test_nothing_is_computed_where_nothing_is_to_learn():
    inputs = make_inputs("rows")
    with Products() as counted:
        linear_ce_kl(**inputs)
        linear_ce(inputs["rows"], weight=inputs["weight"], labels=inputs["labels"])
    assert counted.flops == 3 * 13 * 37 * 6


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, True),
        ({"rows": torch.float16, "weight": torch.float16, "teacher_rows": torch.float16}, False),
        ({"rows": torch.float32}, False),
        ({"teacher_rows": torch.float32}, False),
    ],
)
def test_kernels_take_factors_of_one_type_and_others_are_told_of_once(monkeypatch, caplog, changes, taken):
    linear_losses._warn_of_dtypes.cache_clear()
    dtypes = dict.fromkeys(("rows", "weight", "teacher_rows"), torch.bfloat16) | changes
    factors = {name: torch.zeros(2, 3, dtype=dtype) for name, dtype in dtypes.items()}
    targets = Targets(divergence=Divergence(), teacher_rows=factors["teacher_rows"])
    monkeypatch.setattr(linear_losses, "can_compile_kernels", lambda: True)
    for _ in range(2):
        assert linear_losses.kernels_take(factors["rows"], LinearHead(weight=factors["weight"]), targets) is taken
    told = [
        "found rows {rows}, head {weight}, teacher's rows {teacher_rows}, teacher's head {weight}.".format(**dtypes)
    ]
    told = [message.replace("torch.", "") for message in told]
    assert [message for message in told if message in caplog.text] == ([] if taken else told)
    assert caplog.text.count("losses through a head are slow") == (not taken)
    monkeypatch.setattr(linear_losses, "can_compile_kernels", lambda: False)
    assert not linear_losses.kernels_take(factors["rows"], LinearHead(weight=factors["weight"]), targets)


def test_without_a_compiler_no_kernel_is_tried(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(linear_losses.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    linear_losses.can_compile_kernels.cache_clear()
    assert not linear_losses.can_compile_kernels()
    assert "no C compiler" in caplog.text
    (tmp_path / "cc").touch(mode=0o700)
    linear_losses.can_compile_kernels.cache_clear()
    assert linear_losses.can_compile_kernels()
    linear_losses.can_compile_kernels.cache_clear()
