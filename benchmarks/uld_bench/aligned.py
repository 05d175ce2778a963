"""Aligned ULD against GOLD: equal losses, time at one length, and how the cost grows with the length."""

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from cache_bench.figures import Figure, quartiles, ratio_figure
from torch import Tensor

from distill.uld import align_spans, aligned_uld_loss
from uld_bench.gold import GoldLoss, load_gold
from uld_bench.inputs import Answer, make_answer
from uld_bench.settings import Settings

SECTION = "uld"
LossFunction = Callable[[Tensor, Answer], Tensor]


def measure(settings: Settings) -> Iterator[Figure]:
    """Yield the figures."""
    gold = load_gold()
    if gold is None:
        yield Figure(section=SECTION, name="against GOLD", value=None, bar=10.0, note="trl is not installed")
    else:
        yield from _difference(gold, settings)
        yield from _race(gold, settings)
    yield from _growth(settings)


def aligned_loss(student_logits: Tensor, answer: Answer) -> Tensor:
    """Align from scratch and return the mean over spans, as GOLD does."""
    student, teacher = answer.student, answer.teacher
    spans = align_spans(
        student_ends=student.ends,
        teacher_ends=teacher.ends,
        student_lengths=[len(student.ends)],
        teacher_lengths=[len(teacher.ends)],
    )
    losses = aligned_uld_loss(
        student_logits, teacher.logits, student_ids=student.ids, teacher_ids=teacher.ids, spans=spans
    )
    return losses.mean()


def _difference(gold: GoldLoss, settings: Settings) -> Iterator[Figure]:
    for length in (settings.lengths[0], settings.raced_length, settings.lengths[-1]):
        answer = _answer(length, settings)
        with torch.no_grad():
            own, theirs = float(aligned_loss(answer.student.logits, answer)), float(gold(answer.student.logits, answer))
        yield Figure(
            section=SECTION,
            name=f"relative difference from GOLD's loss, {length} tokens, in millionths",
            value=1e6 * abs(own - theirs) / theirs,
            unit="",
            bar=1.0,
            at_most=True,
            note=f"{own:.7f}; GOLD {theirs:.7f}",
        )
    answer = _answer(settings.lengths[0], settings)
    own_gradient, gold_gradient = (_gradient(loss, answer) for loss in (aligned_loss, gold))
    scale = float(gold_gradient.abs().max())
    yield Figure(
        section=SECTION,
        name=f"largest difference from GOLD's gradient, {settings.lengths[0]} tokens, in millionths of its maximum",
        value=1e6 * float((own_gradient - gold_gradient).abs().max()) / scale,
        unit="",
        bar=1.0,
        at_most=True,
    )


def _race(gold: GoldLoss, settings: Settings) -> Iterator[Figure]:
    answer = _answer(settings.raced_length, settings)
    own_s: list[float] = []
    gold_s: list[float] = []
    for pair in range(settings.pairs):
        for loss, times in ((aligned_loss, own_s), (gold, gold_s))[:: 1 if pair % 2 else -1]:
            times.append(_seconds(loss, answer))
    yield ratio_figure(
        SECTION,
        f"forward and backward, {settings.raced_length} tokens, against GOLD",
        base_s=gold_s,
        own_s=own_s,
        bar=10.0,
        note=f"{statistics.median(own_s):.2f} s; GOLD {statistics.median(gold_s):.2f} s",
    )


def _growth(settings: Settings) -> Iterator[Figure]:
    per_token: dict[int, list[float]] = {length: [] for length in settings.lengths}
    for _ in range(settings.repeats):
        for length, times in per_token.items():
            answer = _answer(length, settings)
            times.append(_seconds(aligned_loss, answer) / len(answer.student.ends))
    shortest = statistics.median(per_token[settings.lengths[0]])
    for length, times in per_token.items():
        low, middle, high = quartiles([seconds / shortest for seconds in times])
        yield Figure(
            section=SECTION,
            name=f"time per token, {length} tokens, against {settings.lengths[0]}",
            value=middle,
            unit="times",
            bar=1.25 if length == settings.lengths[-1] else None,
            at_most=True,
            low=low,
            high=high,
            pairs=len(times),
            note=f"{1e3 * statistics.median(times):.2f} ms per token",
        )


def _answer(length: int, settings: Settings) -> Answer:
    return make_answer(length, student_vocab=settings.student_vocab, teacher_vocab=settings.teacher_vocab)


def _gradient(loss: LossFunction, answer: Answer) -> Tensor:
    logits = answer.student.logits.clone().requires_grad_()
    loss(logits, answer).backward()
    assert logits.grad is not None
    return logits.grad


def _seconds(loss: LossFunction, answer: Answer) -> float:
    logits = answer.student.logits.clone().requires_grad_()
    began = time.perf_counter()
    loss(logits, answer).backward()
    return time.perf_counter() - began
