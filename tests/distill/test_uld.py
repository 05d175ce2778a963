"""Aligned universal logit distillation against GOLD's figures, plain loops and its definition."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill import sorted_distance as sorting
from distill import uld
from distill.sorted_distance import sort_descending, sorted_distance, topk_distance
from distill.uld import (
    SpanTokens,
    align_spans,
    aligned_uld_loss,
    merge_spans,
    topk_uld_loss,
    uld_loss,
)

GOLD = json.loads((Path(__file__).parents[1] / "fixtures" / "gold_uld.json").read_text())
BASES = {"bayesian": "last", "observed": "first"}


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    one, other = (3 * torch.randn(7, 11, dtype=torch.float64, generator=generator) for _ in range(2))
    return one.requires_grad_(), other


def token_lists(tokens: SpanTokens) -> list[list[int]]:
    spans = [[base] for base in tokens.base.tolist()]
    for token, span in zip(tokens.others.tolist(), tokens.span_of_other.tolist(), strict=True):
        spans[span].append(token)
    return [sorted(span) for span in spans]


def align_one(student_ends: list[int], teacher_ends: list[int], **options: Any) -> tuple[list[list[int]], ...]:
    spans = align_spans(
        student_ends=np.array(student_ends),
        teacher_ends=np.array(teacher_ends),
        student_lengths=[len(student_ends)],
        teacher_lengths=[len(teacher_ends)],
        **options,
    )
    return token_lists(spans.student), token_lists(spans.teacher)


def walk(student_ends: list[int], teacher_ends: list[int]) -> tuple[list[list[int]], list[list[int]]]:
    """Align token by token: advance the side that is behind, close a span where both are at the same byte."""
    student_spans, teacher_spans, student_start, teacher_start, s, t = [], [], 0, 0, 0, 0
    while s < len(student_ends) and t < len(teacher_ends):
        ahead = student_ends[s] - teacher_ends[t]
        s, t = s + (ahead <= 0), t + (ahead >= 0)
        if ahead == 0:
            student_spans.append(list(range(student_start, s)))
            teacher_spans.append(list(range(teacher_start, t)))
            student_start, teacher_start = s, t
    return student_spans, teacher_spans


@pytest.mark.parametrize("spans_at_once", [64, 2])
@pytest.mark.parametrize("case", GOLD["cases"], ids=lambda case: f"{case['strategy']} at {case['temperature']}")
def test_loss_and_gradient_equal_those_of_gold(
    case: dict[str, Any], spans_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (uld, sorting):
        monkeypatch.setattr(module, "SPANS_AT_ONCE", spans_at_once)
    sides = GOLD["inputs"]
    # TRL's "observed" reads the row of a token, not the one that predicts it
    rows = slice(None, -1) if case["strategy"] == "bayesian" else slice(1, None)
    all_rows = {side: torch.tensor(sides[side]["logits"], dtype=torch.float64).requires_grad_() for side in sides}
    spans = align_spans(
        student_ends=np.array(sides["student"]["ends"]),
        teacher_ends=np.array(sides["teacher"]["ends"]),
        student_lengths=[len(sides["student"]["ends"])],
        teacher_lengths=[len(sides["teacher"]["ends"])],
        base=BASES[case["strategy"]],
    )
    loss = aligned_uld_loss(
        all_rows["student"][rows],
        all_rows["teacher"][rows],
        student_ids=torch.tensor(sides["student"]["ids"]),
        teacher_ids=torch.tensor(sides["teacher"]["ids"]),
        spans=spans,
        temperature=case["temperature"],
    ).mean()
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-12)
    expected = torch.tensor(case["gradient"], dtype=torch.float64)
    torch.testing.assert_close(all_rows["student"].grad, expected, rtol=1e-10, atol=1e-12)
    assert all_rows["teacher"].grad is None


def small_problem(device: str = "cpu") -> dict[str, Any]:
    spans = align_spans(
        student_ends=np.array([1, 3, 4]), teacher_ends=np.array([2, 3, 4]), student_lengths=[3], teacher_lengths=[3]
    )
    sides = {"student": (3, 7), "teacher": (3, 5)}
    logits = {f"{side}_logits": torch.randn(shape, device=device) for side, shape in sides.items()}
    return {
        **logits,
        **{f"{side}_ids": torch.zeros(3, dtype=torch.int64, device=device) for side in sides},
        "spans": spans,
    }


def test_nothing_is_made_on_another_device_than_the_spans() -> None:
    problem = small_problem()
    expected = aligned_uld_loss(**problem)
    with torch.device("meta"):  # where tensors go that are made without a device
        found = aligned_uld_loss(**problem)
    assert torch.equal(found, expected)


def test_spans_follow_the_logits_to_their_device() -> None:
    problem = small_problem("meta")
    tokens = problem["spans"].student
    assert len(tokens.others)
    for block in uld._blocks(problem["student_logits"], problem["student_ids"], tokens):
        assert {one.device.type for one in vars(block.tokens).values()} == {"meta"}
    assert aligned_uld_loss(**problem).shape == (2,)


def test_spans_close_where_both_tokenisations_end() -> None:
    assert align_one([2, 3, 6, 6], [2, 6, 6]) == ([[0], [1, 2], [3]], [[0], [1], [2]])
    assert align_one([4], [1, 2, 4]) == ([[0]], [[0, 1, 2]])
    # a second token of the teacher that ends with the text has no partner: it belongs to no span
    assert align_one([4], [4, 4]) == ([[0]], [[0]])
    empty = align_spans(student_ends=np.arange(0), teacher_ends=np.arange(0), student_lengths=[], teacher_lengths=[])
    assert empty.student.base.tolist() == []


@pytest.mark.parametrize("seed", range(20))
def test_alignment_equals_a_walk_over_tokens_turn_by_turn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ends: dict[str, list[list[int]]] = {"student": [], "teacher": []}
    for total in rng.integers(1, 12, size=4):
        for turns in ends.values():
            inner = np.sort(rng.integers(0, total + 1, size=rng.integers(0, 9))).tolist()
            turns.append([*inner, int(total)])
    expected: tuple[list[list[int]], list[list[int]]] = ([], [])
    for student, teacher in zip(ends["student"], ends["teacher"], strict=True):
        for found, spans, turns in zip(
            expected, walk(student, teacher), (ends["student"], ends["teacher"]), strict=True
        ):
            before = sum(map(len, turns[: turns.index(student if turns is ends["student"] else teacher)]))
            found.extend([before + token for token in span] for span in spans)
    aligned = align_spans(
        student_ends=np.concatenate(ends["student"]),
        teacher_ends=np.concatenate(ends["teacher"]),
        student_lengths=[*map(len, ends["student"])],
        teacher_lengths=[*map(len, ends["teacher"])],
    )
    assert (token_lists(aligned.student), token_lists(aligned.teacher)) == expected


def test_first_and_last_token_of_a_span_can_stand_for_it() -> None:
    ends = {"student_ends": np.array([1, 2, 3, 3]), "teacher_ends": np.array([3])}
    lengths = {"student_lengths": [4], "teacher_lengths": [1]}
    last, first = align_spans(**ends, **lengths).student, align_spans(**ends, **lengths, base="first").student
    assert (last.base.tolist(), last.others.tolist()) == ([2], [0, 1])
    assert (first.base.tolist(), first.others.tolist()) == ([0], [1, 2])


def test_answers_of_different_texts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"different texts.*\[4\] for the student, \[5\] for the teacher"):
        align_one([4], [5])


def test_a_merged_span_is_the_chain_rule(logits: tuple[Tensor, Tensor]) -> None:
    tokens = SpanTokens(base=torch.tensor([0, 3]), others=torch.tensor([1, 2]), span_of_other=torch.tensor([1, 1]))
    ids = torch.tensor([4, 5, 6, 7, 0, 0, 0])
    probabilities = logits[0].softmax(-1)
    expected = torch.stack([probabilities[0], probabilities[1, 5] * probabilities[2, 6] * probabilities[3]])
    torch.testing.assert_close(merge_spans(logits[0], ids, tokens), expected)


def test_uld_pads_the_smaller_vocabulary_and_ignores_order() -> None:
    student = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.1, 0.5, 0.1, 0.3]], dtype=torch.float64).log()
    expected = torch.tensor([0.2 + 0.1 + 0.0 + 0.1], dtype=torch.float64)
    torch.testing.assert_close(uld_loss(student, teacher), expected)
    torch.testing.assert_close(uld_loss(teacher, student), expected)
    torch.testing.assert_close(uld_loss(student[:, [2, 0, 1]], teacher), expected)


@pytest.mark.parametrize("widths", [(500, 700), (700, 500), (600, 600)])
def test_float32_on_a_cpu_equals_plain_sorting(widths: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(5, width, generator=generator).mul(4).softmax(-1) for width in widths)
    student[0, :9] = 0.0  # ties, and the smallest value there is
    values, index = sort_descending(student)
    assert torch.equal(values, student.sort(-1, descending=True).values)
    assert torch.equal(student.gather(-1, index), values)
    gradients, losses = [], []
    for dtype in (torch.float32, torch.float64):
        leaf = student[1:].to(dtype).requires_grad_()
        loss = sorted_distance(leaf, teacher[1:].to(dtype))
        (loss * torch.arange(1, 5)).sum().backward()
        losses.append(loss.detach().double())
        gradients.append(leaf.grad.double())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    assert torch.equal(*gradients)


def test_topk_uld_bounds_the_full_loss_from_below(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    wide_student = torch.cat([student, student.flip(0)], dim=-1)
    logprobs = teacher.log_softmax(-1)
    full = uld_loss(wide_student, teacher)
    for k in (2, 5):
        assert (topk_uld_loss(wide_student, logprobs.topk(k).values) <= full + 1e-12).all()
    torch.testing.assert_close(topk_uld_loss(wide_student, logprobs.topk(11).values), full)


def test_the_bound_holds_for_scaled_spans_and_is_tight_with_all_values(logits: tuple[Tensor, Tensor]) -> None:
    generator = torch.Generator().manual_seed(5)
    masses = torch.rand(2, 7, generator=generator, dtype=torch.float64)
    student, teacher = (side.detach().softmax(-1) * mass[:, None] for side, mass in zip(logits, masses, strict=True))
    full = sorted_distance(student, teacher)
    ranked = teacher.sort(-1, descending=True).values
    for k in (1, 4, 11):
        bound = topk_distance(student, student_mass=masses[0], topk=ranked[:, :k], teacher_mass=masses[1])
        assert (bound <= full + 1e-12).all()
    torch.testing.assert_close(bound, full)


@pytest.mark.parametrize("loss", [uld_loss, lambda s, t: topk_uld_loss(s, t.log_softmax(-1).topk(3).values)])
def test_uld_passes_gradcheck(loss: Any, logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), (student,))
