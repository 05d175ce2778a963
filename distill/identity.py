"""What decides the result of a training: two runs that agree in it may continue each other."""

from pathlib import Path
from typing import Any

from distill.config import Stage, StudentConfig, TrainConfig
from distill.export import PROCESSOR_FILES
from teacher_cache.teacher_checkpoint import digest_files

FREE_OF_STUDENT = frozenset({"name", "model", "revision", "max_skipped_samples", "trust_remote_code"})
"""Where the student lies and what is put up with; the contents of its files count."""
FREE_OF_STAGE = frozenset({"micro_batch_size", "micro_batch_tokens"})
"""How a global batch is cut into passes."""
FREE_OF_TRAINING = frozenset(
    {
        "stages",
        "num_processes",
        "backend",
        "zero",
        "gradient_checkpointing",
        "save_interval_steps",
        "keep_checkpoints",
        "faults",
        "hang_timeout_s",
        "slow_timeout_s",
        "log_interval_steps",
        "shuffle_gap_interval_steps",
        "validation",
        "encoding_cache_mib",
        "packing",
        "data_workers",
    }
)
"""Layout, intervals and limits. ``faults`` is among them so that a run that stopped for its updates can go on."""
PER_STAGE = frozenset({"align", "distill", "finetune"})


def run_identity(
    student: StudentConfig,
    train: TrainConfig,
    *,
    stage: Stage,
    cache: str,
    samples: str,
    initial_weights: str,
    student_files: str,
) -> dict[str, Any]:
    """Return the identity of one stage. A field of the configuration counts unless it is listed above.

    Args:
        student: The student's settings.
        train: The settings of all stages.
        stage: The stage.
        cache: Fingerprint of the teacher's targets.
        samples: Digest of the samples, in order.
        initial_weights: Digest of what the stage starts from.
        student_files: Digest of the student's configuration, tokenizer and processor.
    """
    # align trains the Recalibrator alone, so that one serves students with adapters and without
    free = FREE_OF_STUDENT | ({"lora"} if stage == "align" else set())
    return {
        "stage": stage,
        "student": student.model_dump(mode="json", exclude=set(free)),
        "settings": train.stage(stage).model_dump(mode="json", exclude=set(FREE_OF_STAGE)),
        **train.model_dump(mode="json", exclude=set(FREE_OF_TRAINING | PER_STAGE)),
        "cache": cache,
        "samples": samples,
        "initial_weights": initial_weights,
        "student_files": student_files,
    }


def student_files_digest(base: Path) -> str:
    """Return the digest of a student's configuration, tokenizer and processor files."""
    patterns = ("config.json", "generation_config.json", *PROCESSOR_FILES)
    return digest_files(sorted({file for pattern in patterns for file in base.glob(pattern)}))
