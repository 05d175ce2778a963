"""Small trainings whose losses are kept in git: ``python -m tests.distill.golden_runs FOLDER`` runs those of ZeRO-3."""

import json
import sys
from pathlib import Path
from typing import Any

from distill.trainer import train_student
from launch.demo.models import ModelSpec, create_model_directory
from teacher_cache.config import CacheConfig
from tests.conftest import CORPUS
from tests.distill.small_cache import build_small_cache, write_data
from tests.distill.small_runs import read_metrics, student_config, train_config

Losses = dict[str, list[dict[str, float]]]

TEACHER = ModelSpec(family="qwen2-vl", tokenizer="byte-bpe", vocab_size=384)
STUDENT = ModelSpec(family="llava", tokenizer="metaspace-bpe", vocab_size=256)
# five steps are more than three epochs of nine samples
STAGE = {"global_batch_size": 6, "micro_batch_size": 3, "max_steps": 5, "learning_rate": 1e-3}
RUNS: dict[str, dict[str, Any]] = {
    "torch genrecal": {"backend": "torch"},
    "torch uld": {"backend": "torch", "method": "uld", "stages": ("distill",)},
    "zero3 genrecal": {"backend": "zero3"},
}


def prepare(folder: Path) -> tuple[CacheConfig, Path]:
    """Make teacher, student, data and cache, the same ones each time; return the cache and the student."""
    teacher, student = folder / "teacher", folder / "student"
    create_model_directory(TEACHER, teacher, corpus=CORPUS, seed=1)
    create_model_directory(STUDENT, student, corpus=CORPUS, seed=3)
    data = write_data(folder / "data", num_samples=9, text_only=(3,), multi_turn=(2, 7))
    return build_small_cache(folder, teacher=teacher, data=data, without_question_rows=("s001", "s005")), student


def losses_of(
    prepared: tuple[CacheConfig, Path],
    output_dir: Path,
    *,
    method: str = "genrecal",
    stages: tuple[str, ...] = ("align", "distill", "finetune"),
    stage: dict[str, Any] | None = None,
    **changes: Any,
) -> Losses:
    """Train and return losses and gradient norms of every step by stage; ``stage`` changes what all stages share."""
    cache, student = prepared
    settings = dict.fromkeys(stages, STAGE | (stage or {}))
    train = train_config(shuffle_gap_interval_steps=5, save_interval_steps=100, **(settings | changes))
    train_student(
        cache=cache,
        student=student_config(student, method=method),
        train=train,
        output_dir=output_dir,
        stages=stages,  # type: ignore[arg-type]
    )
    return {name: [_kept(record) for record in read_metrics(output_dir, name)] for name in stages}


def _kept(record: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name.startswith("train/") or name == "optim/grad_norm"}


def main(folder: Path) -> None:
    """Run the trainings of ZeRO-3 in this process and write their losses."""
    prepared = prepare(folder)
    runs = {name: options for name, options in RUNS.items() if options["backend"] == "zero3"}
    losses = {name: losses_of(prepared, folder / name, **options) for name, options in runs.items()}
    (folder / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
