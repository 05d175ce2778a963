"""Configuration of the Recalibrator. Imports neither torch nor transformers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

OutputNorm = Literal["layernorm", "rmsnorm", "none"]
Positions = Literal["joint", "own"]


@dataclass(frozen=True, kw_only=True)
class RecalibratorConfig:
    """Shape of one Recalibrator; the defaults are the paper's (arXiv 2506.15681)."""

    student_config: "PreTrainedConfig"
    """Text config of the student: its decoder-block family, width, heads, rotary base and initial std."""
    teacher_hidden: int
    """Width of the teacher's final hidden state."""
    num_blocks: int = 2
    """Decoder blocks between the two projections (paper: 2; 1 and 5..20 change little)."""
    output_norm: OutputNorm = "layernorm"
    """Norm on the rows that the teacher's head reads."""
    projection_bias: bool = False
    """Bias in both projections (the paper's parameter counts exclude one)."""
    positions: Positions = "joint"
    """joint: 0, 1, 2, ... over the joint sequence (paper); own: rows keep the positions of their models' tokens."""
    rope_theta: float | None = None
    """Base of the rotary embedding; the student's by default."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass."""

    def __post_init__(self) -> None:
        for name, count in (("teacher_hidden", self.teacher_hidden), ("num_blocks", self.num_blocks)):
            if count < 1:
                raise ValueError(f"Recalibrator {name} must be at least 1, found {count}")
        if self.rope_theta is not None and self.rope_theta <= 0:
            raise ValueError(f"Recalibrator rope_theta must be above 0, found {self.rope_theta}")
        for name, value, choices in (
            ("output_norm", self.output_norm, get_args(OutputNorm)),
            ("positions", self.positions, get_args(Positions)),
        ):
            if value not in choices:
                raise ValueError(f"unknown Recalibrator {name} {value!r}: expected one of {choices}")

    @property
    def student_hidden(self) -> int:
        """Width of the student's hidden states and of the blocks."""
        return self.student_config.hidden_size
