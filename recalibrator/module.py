"""The Recalibrator module: pre-projection, the student's own decoder blocks, post-projection, output norm."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedConfig

from recalibrator.config import OutputNorm, RecalibratorConfig
from recalibrator.joint_sequence import JointSequence

QuestionsFrom = Literal["student", "teacher"]

# What a rotary embedding keeps from the student's: its base and the shape of its frequencies. Length scaling is
# dropped: "dynamic" kinds would make one sample's output depend on the longest sample beside it.
_ROPE_KEYS = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")


class Recalibrator(nn.Module):
    """Turn student questions and teacher answers into rows that the teacher's head can read.

    ``norm(post_projection(blocks([questions ; pre_projection(teacher answers)])))``, evaluated where an answer token
    is predicted. Positions are the Recalibrator's own: 0, 1, 2, ... over the joint sequence, one-dimensional also for
    students with multi-axis rotary positions.
    """

    def __init__(self, config: RecalibratorConfig) -> None:
        super().__init__()
        self.config = config
        bias = config.projection_bias
        std = getattr(config.student_config, "initializer_range", 0.02)
        blocks, rotary = _student_blocks(config)
        self.pre_projection = _linear(config.teacher_hidden, config.student_hidden, bias=bias, std=std)
        self.blocks = blocks
        self.rotary = _Rotary(rotary)
        self.post_projection = _linear(config.student_hidden, config.teacher_hidden, bias=bias, std=std)
        self.output_norm = _output_norm(config.output_norm, config.teacher_hidden)

    def forward(
        self,
        question_rows: Float[Tensor, "question_rows question_hidden"],
        answer_rows: Float[Tensor, "answer_rows teacher_hidden"],
        plan: JointSequence,
        *,
        questions_from: QuestionsFrom,
    ) -> Float[Tensor, "answer_tokens teacher_hidden"]:
        """Return the recalibrated rows that predict the answer tokens, packed by sample, turn, token.

        Args:
            question_rows: Packed question rows; width of the student or of the teacher, as ``questions_from`` says.
            answer_rows: Packed teacher answer rows (see `split_tier_a`).
            plan: Layout of the batch, on the rows' device.
            questions_from: ``student`` for the main pass, ``teacher`` for the regularisation pass.
        """
        self._check_rows(question_rows, answer_rows, plan, questions_from)
        dtype = self.pre_projection.weight.dtype
        questions, answers = question_rows.to(dtype), self.pre_projection(answer_rows.to(dtype))
        if questions_from == "teacher":
            questions = self.pre_projection(questions)
        hidden_states = self._blocks_forward(_scatter(questions, answers, plan), plan)
        predicting = hidden_states.flatten(0, 1).index_select(0, plan.predicting_slots)
        return self.output_norm(self.post_projection(predicting))

    @torch.no_grad()
    def copy_blocks(self, student_layers: nn.ModuleList) -> None:
        """Start the blocks from the student's last decoder layers instead of fresh weights."""
        if len(student_layers) < len(self.blocks):
            raise ValueError(
                f"cannot start {len(self.blocks)} Recalibrator blocks from {len(student_layers)} student layers: "
                "lower num_blocks"
            )
        for block, layer in zip(self.blocks, student_layers[-len(self.blocks) :], strict=True):
            block.load_state_dict(layer.state_dict())

    def _blocks_forward(
        self, hidden_states: Float[Tensor, "batch joint_tokens student_hidden"], plan: JointSequence
    ) -> Float[Tensor, "batch joint_tokens student_hidden"]:
        position_embeddings = self.rotary(hidden_states, plan.positions)
        recompute = self.config.gradient_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            arguments = {"attention_mask": None, "position_embeddings": position_embeddings}
            if recompute:
                hidden_states = checkpoint(block, hidden_states, use_reentrant=False, **arguments)
            else:
                hidden_states = block(hidden_states, **arguments)
        return hidden_states

    def _check_rows(self, questions: Tensor, answers: Tensor, plan: JointSequence, questions_from: str) -> None:
        widths = {"student": self.config.student_hidden, "teacher": self.config.teacher_hidden}
        expected_questions = (len(plan.question_slots), widths[questions_from])
        expected_answers = (len(plan.answer_slots), widths["teacher"])
        for name, rows, expected in (
            (f"question rows from the {questions_from}", questions, expected_questions),
            ("answer rows", answers, expected_answers),
        ):
            if tuple(rows.shape) != expected:
                raise ValueError(
                    f"{name} do not fit the joint sequence: expected shape {expected}, found {tuple(rows.shape)}"
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


def _scatter(
    questions: Float[Tensor, "question_rows student_hidden"],
    answers: Float[Tensor, "answer_rows student_hidden"],
    plan: JointSequence,
) -> Float[Tensor, "batch joint_tokens student_hidden"]:
    slots = torch.cat([plan.question_slots, plan.answer_slots])
    grid = answers.new_zeros(plan.positions.numel(), answers.shape[-1])
    return grid.index_copy(0, slots, torch.cat([questions, answers])).unflatten(0, plan.positions.shape)


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


def _student_blocks(config: RecalibratorConfig) -> tuple[nn.ModuleList, nn.Module]:
    """Build the student family's text model, with next to no vocabulary, and take its layers and rotary embedding."""
    block_config = _block_config(config.student_config, num_blocks=config.num_blocks)
    body = AutoModel.from_config(block_config, dtype=torch.get_default_dtype())
    layers, rotary = getattr(body, "layers", None), getattr(body, "rotary_emb", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(rotary, nn.Module):
        raise ValueError(  # noqa: TRY004 - the config is at fault, not the type of an argument
            f"cannot build Recalibrator blocks of model type {block_config.model_type!r}: expected a text model with "
            f"`layers` and `rotary_emb`, found {type(body).__name__}"
        )
    return layers, rotary


def _block_config(student_config: PreTrainedConfig, *, num_blocks: int) -> PreTrainedConfig:
    """Copy the student's text config for full causal attention at another depth."""
    config = deepcopy(student_config.get_text_config())
    overrides: dict[str, Any] = {
        "num_hidden_layers": num_blocks,
        "vocab_size": 1,
        "pad_token_id": None,
        "use_cache": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": ["full_attention"] * num_blocks,
    }
    for name, value in overrides.items():
        if hasattr(config, name):
            setattr(config, name, value)
    config.rope_parameters = _plain_rope(config)
    # Eager attention is not causal without a mask; sdpa is.
    config._attn_implementation = "sdpa"
    return config


def _plain_rope(config: PreTrainedConfig) -> dict[str, Any]:
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" not in rope:
        raise ValueError(
            f"cannot build Recalibrator blocks of model type {config.model_type!r}: expected one rotary embedding "
            f"with a rope_theta for all layers, found rope_parameters {rope!r}"
        )
    return {"rope_type": "default"} | {key: rope[key] for key in _ROPE_KEYS if key in rope}
