"""A ZeRO-3 step on one device: Recalibrator and losses, as in align, against the same steps without DeepSpeed."""

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from cache_bench.figures import Figure
from gpu_recalibrator import SMALL, STUDENT, make_module, make_rows, on_device
from timing import wait
from torch import Tensor, nn

from distill.config import TrainConfig
from distill.losses import linear_ce_kl
from distill.zero import launched_processes
from distill.zero_config import deepspeed_config
from recalibrator import Recalibrator
from recalibrator.joint_sequence import JointSequence, Turn

BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2}
STEPS = 5


class AlignStep(nn.Module):
    """What align minimises, from question rows on."""

    def __init__(self, recalibrator: Recalibrator, weight: Tensor) -> None:
        super().__init__()
        self.recalibrator = recalibrator
        # a plain tensor, so that ZeRO-3 leaves the teacher's head alone
        self.head = [weight]

    def forward(self, questions: Tensor, answers: Tensor, plan: JointSequence, labels: Tensor) -> Tensor:
        """Return the mean of both terms."""
        rows = self.recalibrator(questions, answers, plan, questions_from="student")
        teacher_rows = answers[: len(rows)].to(rows.dtype)
        losses = linear_ce_kl(rows, teacher_rows=teacher_rows, weight=self.head[0].to(rows.dtype), labels=labels)
        return (losses.ce_loss + losses.kl_loss).mean()


def measure(*, device: str, quick: bool, folder: Path) -> Iterator[Figure]:
    """Yield how far the losses of a few steps are from plain torch's, and the duration of a step."""
    import deepspeed

    dtype = "float32" if device == "cpu" else "bfloat16"
    config, teacher_hidden, vocab = (SMALL, 24, 200) if quick else (STUDENT, 3584, 152_064)
    turns = [[Turn(20, 6)]] * 2 if quick else [[Turn(1800, 248)]] * 4
    module = make_module(config, teacher_hidden=teacher_hidden)
    plan = on_device(turns, device)
    questions, answers = (rows.detach().to(device) for rows in make_rows(plan, module))
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(vocab, teacher_hidden, generator=generator).div_(teacher_hidden**0.5).to(device)
    weight = weight.to(getattr(torch, dtype))
    labels = torch.randint(vocab, (len(plan.predicting_slots),), generator=generator).to(device)
    inputs = (questions, answers, plan, labels)
    plain = _plain_losses(AlignStep(make_module(config, teacher_hidden=teacher_hidden), weight), inputs, device)
    train = TrainConfig.model_validate({"align": {"global_batch_size": 1, "micro_batch_size": 1}})
    with launched_processes(backend="zero3", num_processes=1):
        step = AlignStep(module, weight)
        trained = list(step.parameters())
        settings = deepspeed_config("align", train=train, dtype=dtype, num_trained=sum(p.numel() for p in trained))
        engine, *_ = deepspeed.initialize(model=step, model_parameters=trained, config=settings)
        losses, durations = [], []
        for _ in range(STEPS):
            wait(device)
            start = time.perf_counter()
            loss = engine(*inputs)
            engine.backward(loss)
            engine.step()
            wait(device)
            durations.append(time.perf_counter() - start)
            losses.append(float(loss.detach()))
        engine.destroy()
    error = max(abs(own - expected) / expected for own, expected in zip(losses, plain, strict=True))
    yield Figure(
        section="zero-3 check",
        name=f"{dtype}: losses of {STEPS} steps against plain torch in float32, in units of the bound",
        value=error / BOUNDS[dtype],
        unit="units",
        bar=1,
        at_most=True,
        note=f"relative error {error:.1e}, bound {BOUNDS[dtype]:.1e}; loss {losses[0]:.4f} to {losses[-1]:.4f}",
    )
    yield Figure(
        section="zero-3", name="optimizer step", value=min(durations), unit="s", note=f"{len(labels)} answer tokens"
    )


def _plain_losses(step: AlignStep, inputs: tuple[Tensor, Tensor, JointSequence, Tensor], device: str) -> list[float]:
    """Take the same steps in float32 without DeepSpeed."""
    config = TrainConfig().align
    step = step.to(device)
    optimizer = torch.optim.AdamW(
        step.parameters(),
        lr=config.learning_rate,
        betas=config.adam_betas,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    losses = []
    for _ in range(STEPS):
        loss = step(*inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(step.parameters(), config.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses
