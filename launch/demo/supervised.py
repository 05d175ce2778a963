"""Plain supervised training of a small vision-language model on digit grids.

First the vision encoder and projector learn, as a classifier, to tell the digit and the place of each image
token, for a language model that has never seen an image learns little from tokens that say nothing yet. Then
the whole model learns to answer. Conversations are drawn from the seed and the step number alone, so that a
run continued from a checkpoint sees exactly what an uninterrupted one sees.
"""

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from launch.demo.digits import FAMILIES, DigitImages, compose, random_conversation, shuffled
from launch.demo.encoding import Batch, ConversationEncoder, answer_rows, image_features, rgb
from teacher_cache.progress import progress

logger = logging.getLogger(__name__)

CHECKPOINT_INTERVAL_STEPS = 160
WINDOW_STEPS = 8
"""Batches that are drawn together and sorted by length, to waste little on padding; divides the interval above."""


@dataclass(frozen=True, kw_only=True)
class SupervisedPlan:
    """How a model is trained."""

    steps: int
    seed: int
    half_precision: bool
    """Compute the text body in bfloat16; on a CPU without instructions for it, float32 is several times as fast."""
    vision_steps: int = 400
    batch_size: int = 64
    max_turns: int = 2
    """Questions per conversation, of different families: 1 to so many."""
    learning_rate: float = 2e-3
    """Peak of AdamW's rate, reached after ``warmup_steps`` and followed by linear decay to zero."""
    warmup_steps: int = 50

    def rate(self, step: int, *, steps: int) -> float:
        """Return the learning rate of a step."""
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps) * (1.0 - step / steps)


def has_bfloat16_instructions() -> bool:
    """Return whether this CPU multiplies matrices of bfloat16 itself; False where that cannot be told."""
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and "avx512_bf16" in cpu.read_text()


def train_supervised(
    model: Any, *, processor: Any, images: DigitImages, plan: SupervisedPlan, checkpoint: Path, name: str
) -> list[float]:
    """Train ``model`` in place, continuing from ``checkpoint`` where it exists; return the losses of this call."""
    encoder = ConversationEncoder(processor)
    trainer = SupervisedTrainer(model, plan=plan)
    first = trainer.load(checkpoint)
    if first == 0:
        train_vision(model, processor=processor, images=images, plan=plan, name=name)
        trainer.refresh()
    losses: list[float] = []
    batches = training_batches(images, encoder=encoder, plan=plan, first_step=first)
    with progress(total=plan.steps, unit="step", description=f"{name}: supervised", initial=first) as bar:
        for step, batch in enumerate(batches, start=first):
            losses.append(trainer.step(batch, encoder=encoder, step=step))
            if (step + 1) % CHECKPOINT_INTERVAL_STEPS == 0:
                trainer.save(checkpoint, step=step + 1)
            bar.update(1, loss=round(float(np.mean(losses[-50:])), 3))
    return losses


def train_vision(model: Any, *, processor: Any, images: DigitImages, plan: SupervisedPlan, name: str) -> float:
    """Train vision encoder and projector to classify each image token; return the last loss in nats.

    A linear probe, thrown away afterwards, reads from each token the digit of the cell it shows a part of,
    and its place among the tokens.
    """
    places = image_features(model, processor, [rgb(_grids(images, np.zeros((1, 4), dtype=int))[0])]).shape[1]
    side = int(places**0.5)
    cells = torch.tensor([2 * (row * 2 // side) + column * 2 // side for row in range(side) for column in range(side)])
    torch.manual_seed(plan.seed)
    digit_probe, place_probe = (nn.Linear(model.config.get_text_config().hidden_size, n) for n in (10, places))
    seen = [p for n, p in model.named_parameters() if "language_model" not in n and "lm_head" not in n]
    optimizer = torch.optim.AdamW(
        [*seen, *digit_probe.parameters(), *place_probe.parameters()], betas=(0.9, 0.98), weight_decay=0.01
    )
    rng = np.random.default_rng([plan.seed, 0])
    loss = torch.zeros(())
    with progress(total=plan.vision_steps, unit="step", description=f"{name}: vision encoder") as bar:
        for step in range(plan.vision_steps):
            chosen = rng.integers(len(images.labels), size=(plan.batch_size, 4))
            tokens = image_features(model, processor, [rgb(grid) for grid in _grids(images, chosen)])
            labels = torch.from_numpy(images.labels[chosen])[:, cells]
            places_of = torch.arange(places).expand(len(chosen), -1)
            loss = functional.cross_entropy(digit_probe(tokens).flatten(0, 1), labels.flatten())
            loss = loss + functional.cross_entropy(place_probe(tokens).flatten(0, 1), places_of.flatten())
            optimizer.param_groups[0]["lr"] = plan.rate(step, steps=plan.vision_steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update(1, loss=round(loss.item(), 3))
    return loss.item()


def training_batches(
    images: DigitImages, *, encoder: ConversationEncoder, plan: SupervisedPlan, first_step: int
) -> Iterator[Batch]:
    """Yield the batches from ``first_step`` (a multiple of the window) on."""
    for start in range(first_step, plan.steps, WINDOW_STEPS):
        rng = np.random.default_rng([plan.seed, 1, start])
        conversations = [
            random_conversation(
                images, families=shuffled(FAMILIES, rng=rng)[: rng.integers(1, plan.max_turns + 1)], rng=rng
            )
            for _ in range(plan.batch_size * WINDOW_STEPS)
        ]
        conversations.sort(key=lambda conversation: len(encoder.encode(conversation)[0]))
        for index in rng.permutation(WINDOW_STEPS)[: plan.steps - start].tolist():
            yield encoder.batch(conversations[index * plan.batch_size : (index + 1) * plan.batch_size])


class SupervisedTrainer:
    """A model with float32 weights, a working copy whose text body computes as the plan says, and AdamW."""

    def __init__(self, model: Any, *, plan: SupervisedPlan) -> None:
        self.plan = plan
        self.worker = copy.deepcopy(model)
        for part in (self.worker.model.language_model, self.worker.lm_head) if plan.half_precision else ():
            for parameter in part.parameters():  # not part.to(): rotary frequencies stay float32
                parameter.data = parameter.data.bfloat16()
        self.parameters = list(model.parameters())
        self.working = list(self.worker.parameters())
        decayed = [parameter for parameter in self.parameters if parameter.ndim > 1]
        others = [parameter for parameter in self.parameters if parameter.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)

    def step(self, batch: Batch, *, encoder: ConversationEncoder, step: int) -> float:
        """Take one optimizer step and return the mean loss per answer token in nats."""
        rows = answer_rows(self.worker, encoder, batch)
        labels = batch.token_ids[:, 1:][batch.predicts_answer[:, :-1]]
        loss = functional.cross_entropy(self.worker.lm_head(rows).float(), labels)
        loss.backward()
        for master, working in zip(self.parameters, self.working, strict=True):
            master.grad = None if working.grad is None else working.grad.float()
            working.grad = None
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(step, steps=self.plan.steps)
        self.optimizer.step()
        self.refresh()
        return loss.item()

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the working copy up to date."""
        for master, working in zip(self.parameters, self.working, strict=True):
            working.copy_(master)

    def save(self, path: Path, *, step: int) -> None:
        """Write weights and optimizer state; the file appears whole or not at all."""
        tensors = {f"weight.{index}": parameter.detach() for index, parameter in enumerate(self.parameters)}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata={"step": str(step), "plan": repr(self.plan)})
        partial.replace(path)

    def load(self, path: Path) -> int:
        """Restore what ``save`` wrote and return its step; 0 where there is nothing of this plan."""
        if not path.exists():
            return 0
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        if metadata["plan"] != repr(self.plan):
            return 0
        states: dict[int, dict[str, Tensor]] = {}
        for key, tensor in load_file(path).items():
            kind, index, *name = key.split(".")
            if kind == "weight":
                self.parameters[int(index)].data.copy_(tensor)
            else:
                states.setdefault(int(index), {})[name[0]] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": states})
        self.refresh()
        return int(metadata["step"])


def _grids(images: DigitImages, chosen: Int[np.ndarray, "grids 4"]) -> list[UInt8[np.ndarray, "height width"]]:
    return [compose(images.pixels[four]) for four in chosen]
