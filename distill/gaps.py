"""Does the Recalibrator listen to the student? The question-shuffle gap: its measurement, and warnings about it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from distill.batch import Batch
from distill.engine import Engine
from distill.processes import Processes
from distill.stage_sums import Counts, ShuffleSums, batch_counts

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


def question_shuffle_gap(engine: Engine, batch: Batch, *, processes: Processes) -> dict[str, float]:
    """Return what it costs to give each sample the student's rows of another; every process calls this.

    Rows are swapped within one micro-batch of every process, so a process whose micro-batch has one sample adds
    nothing. Empty where no process has two.
    """
    engine.model.eval()
    with torch.no_grad():
        sums = engine.forward(batch=batch, task="question_shuffle")
    own = [*torch.stack(list(sums)).double().tolist(), *batch_counts(batch)]
    summed = processes.sum(own if len(batch.sample_ids) > 1 else [0.0] * len(own))
    totals = dict(zip(ShuffleSums._fields, summed, strict=False))
    counts = Counts(*summed[len(totals) :])
    return gap_metrics(totals, counts) if counts.answer_tokens else {}


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


@dataclass
class GapWarning:
    """Warns once per stage when the student's rows do not matter, as nothing is distilled then, or are not swapped."""

    label: str
    max_steps: int
    warned: bool = False
    warned_of_absence: bool = False

    def check(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Look at one measurement; the first half of a stage is left to learn to listen."""
        if GAP_METRIC not in metrics:
            self._warn_of_absence(step)
            return
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

    def _warn_of_absence(self, step: int) -> None:
        if self.warned_of_absence:
            return
        self.warned_of_absence = True
        logger.warning(
            "%s step %d: the question-shuffle gap is not measured: it swaps rows within a micro-batch, and no "
            "micro-batch of this step has two samples. Let micro-batches take two or more to see whether the "
            "Recalibrator listens to the student",
            self.label,
            step,
        )
