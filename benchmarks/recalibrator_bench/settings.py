"""Sizes of the Recalibrator's benchmark: a student's shapes, or tiny ones that only show that everything works."""

from dataclasses import dataclass

SECTION = "recalibrator"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of one run."""

    student: dict[str, int]
    """Of a Qwen2 text config."""
    teacher_hidden: int
    joint_tokens: int
    answer_tokens: int
    """Of each sample; the rest of the joint sequence is its question."""
    pairs: int
    batches: dict[str, tuple[int, ...]]
    """Joint tokens of each sample of a batch, by what the lengths are like."""


FULL = Settings(
    student={
        "hidden_size": 896,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
    },
    teacher_hidden=8192,
    joint_tokens=2048,
    answer_tokens=200,
    pairs=5,
    batches={
        "4 equal samples": (512, 512, 512, 512),
        "4 samples, images of one size": (420, 520, 460, 648),
        "4 samples, images of many sizes": (260, 430, 1010, 348),
        "4 samples, one without an image": (60, 700, 640, 648),
    },
)
QUICK = Settings(
    student={"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96},
    teacher_hidden=96,
    joint_tokens=64,
    answer_tokens=8,
    pairs=2,
    batches={"2 equal samples": (24, 24), "3 samples": (12, 40, 20)},
)
