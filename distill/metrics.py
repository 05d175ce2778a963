"""What training logs: the learning-rate schedule, one record per step, one console line per interval."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from distill.config import StageConfig
from distill.stage_spec import StageSpec
from distill.stages import Counts

logger = logging.getLogger(__name__)

GAP_METRIC = "train/question_shuffle_gap"
BOUNDARY_GAP_METRIC = "train/boundary_shuffle_gap"
REST_GAP_METRIC = "train/rest_shuffle_gap"
GAP_WARNING_NATS = 0.05
"""A question-shuffle gap below this means that the Recalibrator hardly listens to the student."""
ONLY_BOUNDARY_ROWS_TEACH = (
    "Only the first token of each answer distils into the student; set train.recalibrator.student_answer_fraction "
    "above 0 to make the others count."
)
NOTHING_TEACHES = (
    "Its losses teach the student nothing: include the boundary row, train align longer, check that the student can "
    "answer the questions at all, or set train.recalibrator.student_answer_fraction above 0."
)


def learning_rate(config: StageConfig, *, step: int, max_steps: int) -> float:
    """Return the learning rate of one step (0-based): warm-up, then linear to the final one at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    decay_steps = max(max_steps - 1 - config.warmup_steps, 1)
    progress = (step - config.warmup_steps) / decay_steps
    return config.learning_rate + progress * (config.final_learning_rate - config.learning_rate)


def loss_metrics(totals: Mapping[str, float], counts: Counts, *, spec: StageSpec) -> dict[str, float]:
    """Return the mean losses per supervised token of the global batch, from the sums of `Totals`."""
    metrics: dict[str, float] = {}
    loss, weights = 0.0, spec.weights
    if counts.answer_tokens:
        metrics["train/ce_loss"] = totals["ce_loss"] / counts.answer_tokens
        metrics["train/kl_loss"] = totals["kl_loss"] / counts.answer_tokens
        loss += weights.ce * metrics["train/ce_loss"] + weights.kl * metrics["train/kl_loss"]
        rest = counts.answer_tokens - counts.boundary_tokens
        if counts.boundary_tokens:
            metrics["train/boundary_ce"] = totals["boundary_ce"] / counts.boundary_tokens
        if rest:
            metrics["train/rest_ce"] = (totals["ce_loss"] - totals["boundary_ce"]) / rest
    if counts.regularization_tokens:
        metrics["train/regularization_loss"] = totals["regularization_loss"] / counts.regularization_tokens
        loss += weights.regularization * metrics["train/regularization_loss"]
    if counts.student_tokens and spec.with_answers:
        metrics["train/sft_loss"] = totals["sft_loss"] / counts.student_tokens
        loss += weights.sft * metrics["train/sft_loss"]
    if counts.baseline_terms and spec.baseline is not None:
        metrics[f"train/{spec.baseline}_loss"] = totals["baseline_loss"] / counts.baseline_terms
        loss += weights.baseline * metrics[f"train/{spec.baseline}_loss"]
    return {"train/loss": loss, **metrics}


def gap_metrics(sums: Mapping[str, float], counts: Counts) -> dict[str, float]:
    """Return how many nats per token it costs to take the student's rows from other samples.

    Over all supervised tokens, and apart for those that boundary rows predict and the others; ``sums`` are those of
    `ShuffleSums`.
    """
    gap, boundary_gap = sums["other"] - sums["own"], sums["other_boundary"] - sums["own_boundary"]
    metrics = {GAP_METRIC: gap / max(counts.answer_tokens, 1)}
    if counts.boundary_tokens:
        metrics[BOUNDARY_GAP_METRIC] = boundary_gap / counts.boundary_tokens
    if rest := counts.answer_tokens - counts.boundary_tokens:
        metrics[REST_GAP_METRIC] = (gap - boundary_gap) / rest
    return metrics


def keep_steps(path: Path, *, until: int) -> None:
    """Drop the lines of a file that a killed run wrote after its last checkpoint: those steps are taken again."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if _before(line, until)] if until else []
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept))
    temporary.replace(path)


class MetricsFile:
    """Append-only metrics.jsonl of one stage, one JSON object per optimizer step; without a path, nothing."""

    def __init__(self, path: Path | None, *, start_step: int) -> None:
        self._file: TextIO | None = None
        if path is None:
            return
        keep_steps(path, until=start_step)
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


@dataclass
class GapWarning:
    """Warns once per stage when the student's rows do not matter: then nothing is distilled."""

    label: str
    max_steps: int
    warned: bool = False

    def check(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Look at one measurement; the first half of a stage is left to learn to listen."""
        if self.warned or 2 * step < self.max_steps or metrics[GAP_METRIC] >= GAP_WARNING_NATS:
            return
        self.warned = True
        boundary_gap = metrics.get(BOUNDARY_GAP_METRIC, 0.0)
        listens = boundary_gap >= GAP_WARNING_NATS
        logger.warning(
            "%s step %d: the question-shuffle gap is %.4f nats per token (%.4f at boundary rows): with the rows of "
            "another sample the Recalibrator answers as well, because it copies the teacher's answer rows. %s",
            self.label,
            step,
            metrics[GAP_METRIC],
            boundary_gap,
            ONLY_BOUNDARY_ROWS_TEACH if listens else NOTHING_TEACHES,
        )


def _before(line: str, step: int) -> bool:
    try:
        return int(json.loads(line)["global_step"]) <= step
    except (ValueError, KeyError, TypeError):
        return False
