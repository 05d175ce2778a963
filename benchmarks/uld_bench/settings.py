"""Sizes of the ULD benchmark."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    student_vocab: int
    teacher_vocab: int
    lengths: tuple[int, ...]
    """Student answer tokens of the runs that show how the cost grows, in order."""
    raced_length: int
    """Student answer tokens of the race against GOLD."""
    pairs: int
    """Timed pairs of the race."""
    repeats: int
    """Timed runs of each length."""


FULL = Settings(
    student_vocab=32_000,
    teacher_vocab=50_000,
    lengths=(128, 256, 512, 1024, 2048),
    raced_length=512,
    pairs=3,
    repeats=5,
)
QUICK = Settings(student_vocab=300, teacher_vocab=500, lengths=(16, 32), raced_length=32, pairs=2, repeats=2)
