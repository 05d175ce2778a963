"""Sizes of the trainer's benchmark: for a CPU, or tiny ones that only show that everything works."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from launch.demo.models import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of one run."""

    teacher: ModelSpec
    students: Mapping[str, ModelSpec]
    """By name; the speeds are those of the first."""
    num_samples: int
    words: tuple[int, int]
    """Of a question and of an answer, on average."""
    image_side: int
    stage: Mapping[str, Any]
    """Batch sizes of the steps with and without the live teacher."""
    step_pairs: int
    trainings_samples: int
    """Samples of each stage where whole trainings are compared."""
    overhead_stage: Mapping[str, Any]
    """Batch sizes of the steps with and without the trainer."""
    overhead_pairs: int
    equality_runs: tuple[str, ...]
    """Names of the runs whose losses are compared."""
    with_vllm: bool
    """Compare those of vLLM too."""


_TEACHER = ModelSpec(family="qwen2-vl", tokenizer="byte-bpe", vocab_size=2048, initializer_range=0.02)
_STUDENT = replace(
    _TEACHER, hidden_size=320, intermediate_size=1280, num_layers=6, num_heads=5, num_kv_heads=5, vision_hidden=64
)
FULL = Settings(
    teacher=replace(
        _TEACHER,
        hidden_size=1024,
        intermediate_size=4096,
        num_layers=10,
        num_heads=16,
        num_kv_heads=16,
        vision_hidden=256,
        vision_layers=2,
        vision_heads=4,
    ),
    students={
        "llava": replace(_STUDENT, family="llava", tokenizer="metaspace-bpe", tile_size=32),
        "internvl": replace(_STUDENT, family="internvl", text_model="qwen3", tile_size=64),
        "qwen2-vl": _STUDENT,
    },
    num_samples=32,
    words=(60, 40),
    image_side=64,
    stage={"global_batch_size": 8, "micro_batch_size": 8},
    step_pairs=5,
    trainings_samples=24,
    overhead_stage={"global_batch_size": 8, "micro_batch_size": 4},
    overhead_pairs=20,
    equality_runs=(
        "genrecal",
        "genrecal with stand-ins",
        "kd from top-k",
        "kd from rows",
        "uld from top-k",
        "uld from rows",
    ),
    with_vllm=True,
)
_SMALL = ModelSpec(family="qwen2-vl", tokenizer="byte-bpe", vocab_size=384)
QUICK = Settings(
    teacher=replace(_SMALL, hidden_size=128, intermediate_size=256, num_layers=4),
    students={
        "llava": replace(_SMALL, family="llava", tokenizer="metaspace-bpe", vocab_size=256),
    },
    num_samples=8,
    words=(12, 6),
    image_side=16,
    stage={"global_batch_size": 4, "micro_batch_size": 2},
    step_pairs=2,
    trainings_samples=8,
    overhead_stage={"global_batch_size": 4, "micro_batch_size": 2},
    overhead_pairs=2,
    equality_runs=("genrecal", "uld from top-k"),
    with_vllm=False,
)
