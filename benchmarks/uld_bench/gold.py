"""The loss of TRL's GOLD trainer on the benchmark's inputs."""

from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace

import torch
from torch import Tensor

from uld_bench.inputs import Answer, Side

GoldLoss = Callable[[Tensor, Answer], Tensor]


def load_gold() -> GoldLoss | None:
    """Return a function of student logits and answer, or None where TRL is not installed."""
    if find_spec("trl") is None:
        return None
    from trl.experimental.gold.gold_trainer import ULDLoss

    loss = ULDLoss(
        SimpleNamespace(
            uld_crossentropy_weight=0.0,
            uld_distillation_weight=1.0,
            uld_student_temperature=1.0,
            uld_teacher_temperature=1.0,
            uld_skip_student_eos=False,
            uld_skip_teacher_eos=False,
            use_extended_uld=True,
            uld_token_merge_strategy="bayesian",
        )
    )

    def gold_loss(student_logits: Tensor, answer: Answer) -> Tensor:
        sides = (answer.student, answer.teacher)
        # the row that predicts token t stands at t - 1: one token of the question comes first, and no row comes last
        logits = (student_logits[None], answer.teacher.logits[None])
        return loss(*logits, *map(_labels, sides), *map(_ids, sides), *map(_offsets, sides))

    return gold_loss


def _ids(side: Side) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.long), side.ids])[None]


def _labels(side: Side) -> Tensor:
    return torch.cat([torch.tensor([-100]), side.ids])[None]


def _offsets(side: Side) -> Tensor:
    ends = torch.cat([torch.zeros(1, dtype=torch.long), torch.from_numpy(side.ends)])
    return torch.stack([ends.roll(1), ends], dim=-1)[None]
