"""What training logs: the learning-rate schedule, one record per step, one console line per interval."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from distill.config import StageConfig
from distill.stages import Counts

logger = logging.getLogger(__name__)

GAP_METRIC = "train/question_shuffle_gap"
GAP_WARNING_NATS = 0.05
"""A question-shuffle gap below this means that the Recalibrator hardly listens to the student."""


def learning_rate(config: StageConfig, *, step: int, max_steps: int) -> float:
    """Return the learning rate of one step (0-based): warm-up, then linear to the final one at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    decay_steps = max(max_steps - 1 - config.warmup_steps, 1)
    progress = (step - config.warmup_steps) / decay_steps
    return config.learning_rate + progress * (config.final_learning_rate - config.learning_rate)


def loss_metrics(totals: Mapping[str, float], counts: Counts, *, regularization_weight: float) -> dict[str, float]:
    """Return the mean losses, in nats per supervised token of the global batch, from the sums of `Totals`."""
    metrics: dict[str, float] = {}
    loss = 0.0
    if counts.answer_tokens:
        metrics["train/ce_loss"] = totals["ce_loss"] / counts.answer_tokens
        metrics["train/kl_loss"] = totals["kl_loss"] / counts.answer_tokens
        loss += metrics["train/ce_loss"] + metrics["train/kl_loss"]
        rest = counts.answer_tokens - counts.boundary_tokens
        if counts.boundary_tokens:
            metrics["train/boundary_ce"] = totals["boundary_ce"] / counts.boundary_tokens
        if rest:
            metrics["train/rest_ce"] = (totals["ce_loss"] - totals["boundary_ce"]) / rest
    if counts.regularization_tokens:
        metrics["train/regularization_loss"] = totals["regularization_loss"] / counts.regularization_tokens
        loss += regularization_weight * metrics["train/regularization_loss"]
    if counts.student_tokens:
        metrics["train/sft_loss"] = totals["sft_loss"] / counts.student_tokens
        metrics["train/topk_kl_loss"] = totals["topk_kl_loss"] / counts.student_tokens
        loss += metrics["train/sft_loss"] + metrics["train/topk_kl_loss"]
    if not totals["topk_kl_loss"]:
        metrics.pop("train/topk_kl_loss", None)
    return {"train/loss": loss, **metrics}


class MetricsFile:
    """Append-only metrics.jsonl of one stage, one JSON object per optimizer step; without a path, nothing."""

    def __init__(self, path: Path | None, *, start_step: int) -> None:
        self._file: TextIO | None = None
        if path is None:
            return
        # what a killed run logged after its last checkpoint is computed again
        kept = [line for line in path.read_text().splitlines() if _before(line, start_step)] if path.exists() else []
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(path)
        self._file = path.open("a")

    def write(self, record: Mapping[str, object]) -> None:
        """Append one record."""
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def console_line(stage: str, *, max_steps: int, record: Mapping[str, float]) -> str:
    """Return one line a human can follow."""
    short = {name.split("/")[1]: value for name, value in record.items() if name.startswith("train/")}
    losses = " | ".join(f"{name} {value:.4f}" for name, value in short.items())
    step = int(record["global_step"])
    speed = f"dt {1e3 * record['time/step_s']:.0f}ms | tok/s {record['throughput/tokens_per_s']:,.0f}"
    return (
        f"{stage} step {step:05d}/{max_steps:05d} ({100 * step / max_steps:.1f}%) | {losses} | "
        f"norm {record['optim/grad_norm']:.3f} | lr {record['optim/lr']:.2e} | {speed} | "
        f"wait {100 * record['data/wait_fraction']:.0f}%"
    )


def warn_of_small_gap(gap: float, *, step: int) -> None:
    """Warn when wrong questions are as good as the right ones: then nothing is distilled."""
    if gap < GAP_WARNING_NATS:
        logger.warning(
            "step %d: the question-shuffle gap is %.4f nats: the Recalibrator answers as well from other samples' "
            "questions, so its losses teach the student nothing; train align longer or check the student",
            step,
            gap,
        )


def _before(line: str, step: int) -> bool:
    try:
        return int(json.loads(line)["global_step"]) <= step
    except ValueError:
        return False
