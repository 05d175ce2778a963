"""What the losses of a stage sum up to, over the tokens of a micro-batch or of all processes."""

from typing import NamedTuple

from torch import Tensor

from distill.batch import Batch


class Totals(NamedTuple):
    """Sums over supervised tokens; the losses in nats, but feature_mse and uld in squared features and probability.

    A tuple, so that ZeRO-3's hooks see the tensors inside.
    """

    ce_loss: Tensor
    kl_loss: Tensor
    boundary_ce: Tensor
    regularization_loss: Tensor
    sft_loss: Tensor
    baseline_loss: Tensor
    """Of kd per student token, of uld per aligned span."""


class Counts(NamedTuple):
    """Supervised tokens, weighted."""

    answer_tokens: float
    boundary_tokens: float
    regularization_tokens: float
    student_tokens: float
    baseline_terms: float
    """Student tokens of kd, aligned spans of uld."""


class StageLosses(NamedTuple):
    """Share of one micro-batch of one process in the loss of the global batch, and its parts."""

    loss: Tensor
    totals: Totals


class ShuffleSums(NamedTuple):
    """Sums of cross-entropy, in nats, with the student's rows of the sample itself and with another sample's."""

    own: Tensor
    own_boundary: Tensor
    """Over the boundary rows alone."""
    other: Tensor
    other_boundary: Tensor


def batch_counts(batch: Batch) -> Counts:
    """Return the supervised tokens of one micro-batch."""
    main, regularization, targets = batch.main, batch.regularization, batch.logit_targets
    student_tokens = float(batch.student.weights.sum())
    spans = None if targets is None else targets.span_weights
    return Counts(
        answer_tokens=0.0 if main is None else float(main.weights.sum()),
        boundary_tokens=0.0 if main is None else float((main.weights * main.plan.boundary_mask).sum()),
        regularization_tokens=0.0 if regularization is None else float(regularization.weights.sum()),
        student_tokens=student_tokens,
        baseline_terms=student_tokens if spans is None else float(spans.sum()),
    )
