"""The Recalibrator on a device: checked against float64, and its forward and backward pass at a student's shapes."""

from collections.abc import Iterator
from pathlib import Path

import torch
from cache_bench.figures import Figure
from timing import seconds
from torch import Tensor
from transformers import Qwen2Config

from distill.records import to_device
from recalibrator import Recalibrator, RecalibratorConfig
from recalibrator.joint_sequence import JointSequence, Turn, plan_joint_sequence

BOUND = 1e-5
SMALL = Qwen2Config(
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    num_hidden_layers=2,
    vocab_size=64,
)
# Qwen2.5-0.5B
STUDENT = Qwen2Config(
    hidden_size=896, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864, num_hidden_layers=2
)


def measure(*, device: str, quick: bool, folder: Path) -> Iterator[Figure]:
    """Yield the error of the output and of the gradient at the questions, and the speed."""
    turns = [[Turn(5, 3), Turn(2, 4)], [Turn(7, 2)]]
    exact = run(make_module(SMALL, teacher_hidden=24).double(), plan_joint_sequence(turns))
    found = run(make_module(SMALL, teacher_hidden=24).to(device), on_device(turns, device))
    errors = [float((a.cpu().double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
    yield Figure(
        section="recalibrator check",
        name="float32: relative error, in units of its bound",
        value=max(errors) / BOUND,
        unit="units",
        bar=1,
        at_most=True,
        note=f"output {errors[0]:.1e}, gradient {errors[1]:.1e}, bound {BOUND:.1e}",
    )
    config, teacher_hidden, samples = (SMALL, 24, 2) if quick else (STUDENT, 8192, 4)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    module = make_module(config, teacher_hidden=teacher_hidden).to(device, dtype)
    turns = [[Turn(40, 10)] if quick else [Turn(1800, 248)]] * samples
    plan = on_device(turns, device)
    rows = make_rows(plan, module)
    duration = seconds(lambda: differentiate(module, plan, *rows), device=device, repeats=2 if quick else 10)
    tokens = samples * sum(turns[0][0])
    yield Figure(
        section="recalibrator",
        name="forward and backward",
        value=tokens / duration,
        unit="joint tokens/s",
        note=f"{dtype}, {samples} samples of {tokens // samples} tokens, {teacher_hidden} to {config.hidden_size}",
    )


def make_module(config: Qwen2Config, *, teacher_hidden: int) -> Recalibrator:
    """Return the same weights each time."""
    torch.manual_seed(0)
    return Recalibrator(RecalibratorConfig(student_config=config, teacher_hidden=teacher_hidden))


def on_device(turns: list[list[Turn]], device: str) -> JointSequence:
    """Return the plan of a batch, with its indices on a device."""
    return to_device(plan_joint_sequence(turns), torch.device(device))


def make_rows(plan: JointSequence, module: Recalibrator) -> tuple[Tensor, Tensor]:
    """Return question and answer rows beside the module's weights."""
    generator = torch.Generator().manual_seed(1)
    weight = module.pre_projection.weight
    questions = torch.randn(len(plan.question_slots), module.config.student_hidden, generator=generator)
    answers = torch.randn(len(plan.answer_slots), module.config.teacher_hidden, generator=generator)
    return questions.to(weight).requires_grad_(), answers.to(weight)


def run(module: Recalibrator, plan: JointSequence) -> tuple[Tensor, Tensor]:
    """Return the output for random rows, and the gradient of a weighted sum of it at the question rows."""
    return differentiate(module, plan, *make_rows(plan, module))


def differentiate(
    module: Recalibrator, plan: JointSequence, questions: Tensor, answers: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the output, and the gradient of a weighted sum of it at the question rows; all weights get theirs too."""
    output = module(questions, answers, plan, questions_from="student")
    weights = torch.linspace(-1, 1, output.shape[1], device=output.device, dtype=output.dtype)
    gradient, *_ = torch.autograd.grad((output * weights).sum(), [questions, *module.parameters()], allow_unused=True)
    return output.detach(), gradient
