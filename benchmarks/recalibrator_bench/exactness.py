"""How far one packed row is from one sample at a time, in float32: recalibrated rows, and gradients of everything."""

from collections.abc import Iterator, Sequence

import torch
from cache_bench.figures import Figure
from torch import Tensor

from recalibrator import Recalibrator
from recalibrator.joint_sequence import Turn, plan_joint_sequence
from recalibrator_bench.settings import SECTION, Settings

BAR = 1.0


def measure(module: Recalibrator, settings: Settings) -> Iterator[Figure]:
    """Yield the largest relative difference over the batches, in millionths of a tensor's norm."""
    worst = max(_difference(module, lengths, settings) for lengths in settings.batches.values())
    yield Figure(
        section=SECTION,
        name="packed against one sample at a time, largest difference",
        value=worst[0],
        unit="millionths",
        bar=BAR,
        at_most=True,
        note=f"of the norm of {worst[1]}; rows and gradients of all inputs and weights",
    )


def _difference(module: Recalibrator, lengths: Sequence[int], settings: Settings) -> tuple[float, str]:
    answers = min(settings.answer_tokens, min(lengths) // 2)
    turns = [[Turn(length - answers, answers)] for length in lengths]
    questions = torch.randn(sum(lengths) - answers * len(lengths), module.config.student_hidden)
    answer_rows = torch.randn(answers * len(lengths), settings.teacher_hidden)
    weights = torch.randn(len(answer_rows), settings.teacher_hidden)
    packed = _run(module, questions, answer_rows, weights, [turns])
    alone = _run(module, questions, answer_rows, weights, [[sample] for sample in turns])
    differences = []
    for name, expected in alone.items():
        # the terms of a key bias's gradient nearly cancel, so it is held against that of the weight
        scale = alone[name.replace("bias", "weight")] if name.endswith("k_proj.bias") else expected
        differences.append((float((packed[name] - expected).norm() / scale.norm()) * 1e6, name))
    return max(differences)


def _run(
    module: Recalibrator, questions: Tensor, answers: Tensor, weights: Tensor, batches: Sequence[list[list[Turn]]]
) -> dict[str, Tensor]:
    questions, answers = questions.clone().requires_grad_(), answers.clone().requires_grad_()
    plans = [plan_joint_sequence(batch) for batch in batches]
    parts = zip(
        questions.split([len(plan.question_slots) for plan in plans]),
        answers.split([len(plan.answer_slots) for plan in plans]),
        plans,
        strict=True,
    )
    output = torch.cat([module(*part, questions_from="student") for part in parts])
    named = {"the questions": questions, "the answers": answers, **dict(module.named_parameters())}
    gradients = torch.autograd.grad((output * weights).sum(), list(named.values()))
    return {"the output": output.detach(), **dict(zip(named, gradients, strict=True))}
