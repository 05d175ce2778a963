"""The Recalibrator module: pre-projection, the student's own decoder blocks, post-projection, output norm."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recalibrator.attention import choose_attention
from recalibrator.config import OutputNorm, RecalibratorConfig
from recalibrator.joint_sequence import JointSequence
from recalibrator.needed_rows import run_at_rows
from recalibrator.student_blocks import build_student_blocks

QuestionsFrom = Literal["student", "teacher"]


class Recalibrator(nn.Module):
    """Turn student questions and teacher answers into rows that the teacher's head can read.

    ``norm(post_projection(blocks([questions ; pre_projection(teacher answers)])))``, evaluated where an answer token
    is predicted. The samples of a batch lie packed in one row, and attention stays within each of them. Positions are
    one-dimensional also for students with multi-axis rotary positions.
    """

    def __init__(self, config: RecalibratorConfig) -> None:
        super().__init__()
        self.config = config
        bias = config.projection_bias
        std = getattr(config.student_config, "initializer_range", 0.02)
        parts = build_student_blocks(config)
        self.pre_projection = _linear(config.teacher_hidden, config.student_hidden, bias=bias, std=std)
        self.blocks = parts.layers
        self.block_config = parts.config
        self.rotary = _Rotary(parts.rotary)
        self.post_projection = _linear(config.student_hidden, config.teacher_hidden, bias=bias, std=std)
        self.output_norm = _output_norm(config.output_norm, config.teacher_hidden)

    def forward(
        self,
        question_rows: Float[Tensor, "question_rows question_hidden"],
        answer_rows: Float[Tensor, "answer_rows teacher_hidden"],
        plan: JointSequence,
        *,
        questions_from: QuestionsFrom,
        are_finite: bool = False,
    ) -> Float[Tensor, "answer_tokens teacher_hidden"]:
        """Return the recalibrated rows that predict the answer tokens, packed by sample, turn, token.

        Args:
            question_rows: Packed question rows; width of the student or of the teacher, as ``questions_from`` says.
            answer_rows: Packed teacher answer rows (see `split_tier_a`).
            plan: Layout of the batch, on the rows' device.
            questions_from: ``student`` for the main pass, ``teacher`` for the regularisation pass.
            are_finite: The caller has seen that all rows are. Otherwise they are looked at, which waits for the device.
        """
        self._check_shapes(question_rows, answer_rows, plan, questions_from)
        if not are_finite:
            _check_finite(question_rows, answer_rows, plan, questions_from)
        dtype = self.pre_projection.weight.dtype
        questions, answers = question_rows.to(dtype), self.pre_projection(answer_rows.to(dtype))
        if questions_from == "teacher":
            questions = self.pre_projection(questions)
        slots = torch.cat([plan.question_slots, plan.answer_slots])
        rows = torch.cat([questions, answers])
        hidden_states = self._blocks_forward(torch.empty_like(rows).index_copy(0, slots, rows)[None], plan)
        predicting = hidden_states[0].index_select(0, plan.predicting_slots)
        return self.output_norm(self.post_projection(predicting))

    @torch.no_grad()
    def copy_blocks(self, student_layers: nn.ModuleList) -> None:
        """Start the blocks from the student's last decoder layers instead of fresh weights.

        Raises:
            ValueError: There are too few, or one has other weights, as the linear attention of a hybrid student has.
        """
        if len(student_layers) < len(self.blocks):
            raise ValueError(
                f"cannot start {len(self.blocks)} Recalibrator blocks from {len(student_layers)} student layers: "
                "lower num_blocks"
            )
        for block, layer in zip(self.blocks, student_layers[-len(self.blocks) :], strict=True):
            try:
                block.load_state_dict(layer.state_dict())
            except RuntimeError as error:
                raise ValueError(
                    f"cannot start Recalibrator blocks, all of full attention, from the last {len(self.blocks)} "
                    f"student layers: one has other weights ({', '.join(name for name, _ in layer.named_children())})"
                ) from error

    def _blocks_forward(
        self, hidden_states: Float[Tensor, "1 joint_tokens student_hidden"], plan: JointSequence
    ) -> Float[Tensor, "1 joint_tokens student_hidden"]:
        positions = plan.positions if self.config.positions == "joint" else plan.own_positions
        attention = choose_attention(hidden_states, plan)
        self.block_config._attn_implementation = attention.implementation
        arguments = {
            "attention_mask": None,
            "position_embeddings": self.rotary(hidden_states, positions[None]),
            **attention.arguments,
        }
        recompute = self.config.gradient_checkpointing and torch.is_grad_enabled()
        *earlier, last = self.blocks
        steps: list[Callable[..., Tensor]] = [*earlier, partial(run_at_rows, last, plan.predicting_slots)]
        for step in steps:
            run = partial(checkpoint, step, use_reentrant=False) if recompute else step
            hidden_states = run(hidden_states, **arguments)
        return hidden_states

    def _check_shapes(self, questions: Tensor, answers: Tensor, plan: JointSequence, questions_from: str) -> None:
        widths = {"student": self.config.student_hidden, "teacher": self.config.teacher_hidden}
        for name, rows, slots, width in (
            (f"question rows from the {questions_from}", questions, plan.question_slots, widths[questions_from]),
            ("answer rows", answers, plan.answer_slots, widths["teacher"]),
        ):
            expected, found = (len(slots), width), tuple(rows.shape)
            if found != expected:
                raise ValueError(
                    f"{name} do not fit the joint sequence of {len(plan.lengths)} samples: expected shape {expected}, "
                    f"found {found}. The rows must be those of the samples that the layout was made for"
                )


def _check_finite(questions: Tensor, answers: Tensor, plan: JointSequence, questions_from: str) -> None:
    # one sum tells, and one wait for the device: a finite sum has no NaN or infinite term
    if not torch.stack([rows.detach().sum(dtype=torch.float32) for rows in (questions, answers)]).isfinite().all():
        _refuse_non_finite(f"question rows from the {questions_from}", questions, plan, plan.question_slots)
        _refuse_non_finite("answer rows", answers, plan, plan.answer_slots)


def _refuse_non_finite(name: str, rows: Tensor, plan: JointSequence, slots: Tensor) -> None:
    bad = (~rows.detach().isfinite().all(dim=1)).nonzero()[:, 0]
    if len(bad):
        sample = int(plan.samples_of(slots[bad[:1]]))
        raise ValueError(
            f"{name} hold NaN or infinite values: {len(bad)} of {len(rows)} rows of width {rows.shape[1]}, the first "
            f"is row {int(bad[0])}, of sample {sample} in the batch (both counted from 0). Look at that sample's "
            "inputs, and for a student at the learning rate: its weights may have diverged"
        )


class _Rotary(nn.Module):
    """Keep the frequencies of a rotary embedding in their own precision when the module is cast."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, hidden_states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.rotary(hidden_states, positions)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Rotary":
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


def _linear(in_features: int, out_features: int, *, bias: bool, std: float) -> nn.Linear:
    linear = nn.Linear(in_features, out_features, bias=bias)
    nn.init.normal_(linear.weight, std=std)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def _output_norm(kind: OutputNorm, width: int) -> nn.Module:
    norms: dict[OutputNorm, Callable[[], nn.Module]] = {
        "layernorm": lambda: nn.LayerNorm(width),
        "rmsnorm": lambda: nn.RMSNorm(width, eps=1e-6),
        "none": nn.Identity,
    }
    return norms[kind]()
