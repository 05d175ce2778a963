"""The figures of a step that mathematics decides: the learning rate, losses per token; and which logged lines stay."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from distill.config import StageConfig
from distill.stage_spec import StageSpec
from distill.stage_sums import Counts


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


def keep_steps(path: Path, *, until: int) -> None:
    """Drop the lines of a file that a killed run wrote after its last checkpoint: those steps are taken again."""
    kept = [line for step, line in logged_lines(path) if until > 0 and step <= until]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept))
    temporary.replace(path)


def logged_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file with their steps; one that a kill cut off is no line."""
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            yield int(json.loads(line)["global_step"]), line
        except (ValueError, KeyError, TypeError):
            continue
