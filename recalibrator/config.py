"""Configuration of the Recalibrator. Imports neither torch nor transformers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

OutputNorm = Literal["layernorm", "rmsnorm", "none"]


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
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass."""

    def __post_init__(self) -> None:
        for name, value in (("teacher_hidden", self.teacher_hidden), ("num_blocks", self.num_blocks)):
            if value < 1:
                raise ValueError(f"Recalibrator {name} must be at least 1, found {value}")
        if self.output_norm not in get_args(OutputNorm):
            raise ValueError(
                f"unknown Recalibrator output_norm {self.output_norm!r}: expected one of {get_args(OutputNorm)}"
            )

    @property
    def student_hidden(self) -> int:
        """Width of the student's hidden states and of the blocks."""
        return self.student_config.hidden_size
