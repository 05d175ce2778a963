"""The regularization loss of the paper in its forms: what holds the Recalibrator's output to the teacher's own rows."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from distill.chunked_losses import DEFAULT_CHUNKS, ChunkSizes, linear_ce, linear_divergence, weighted_ce_kl
from distill.linear_head import LinearHead, accumulation_dtype
from distill.loss_names import RegularizationForm
from distill.losses import feature_mse


def regularization_loss(
    form: RegularizationForm,
    rows: Float[Tensor, "tokens hidden"],
    *,
    teacher_rows: Float[Tensor, "tokens hidden"],
    head: LinearHead,
    labels: Int[Tensor, " tokens"],
    sample_ids: Sequence[str] | None = None,
    chunks: ChunkSizes = DEFAULT_CHUNKS,
) -> Float[Tensor, " tokens"]:
    """Return the regularization loss of each token, from the rows that came of the teacher's own questions.

    Formula: ``none`` 0; ``feature_mse`` `feature_mse(rows, teacher_rows)`; ``kl`` ``KL(teacher || rows)`` and ``ce``
    the cross-entropy at the labels, both through the head; ``ce_kl`` their sum. Nats, except for ``feature_mse``.
    Why: it keeps the Recalibrator's output where the teacher's head can read it; the paper's averages over four
    benchmarks are 70.1, 71.7, 73.5, 74.6 and 76.4 in this order.
    Source: arXiv 2506.15681, L_reg and its ablation.
    """
    if form == "none":
        return rows.new_zeros(rows.shape[0], dtype=accumulation_dtype(rows.dtype))
    if form == "feature_mse":
        return feature_mse(rows, teacher_rows)
    # of one type both sides are one product
    teacher_rows = teacher_rows.to(rows.dtype)
    options: dict[str, Any] = {"sample_ids": sample_ids, "chunks": chunks}
    if form == "ce_kl":
        return weighted_ce_kl(rows, teacher_rows=teacher_rows, head=head, labels=labels, **options).loss
    options |= {
        "weight": head.weight,
        "bias": head.bias,
        "logit_scale": head.logit_scale,
        "logit_softcap": head.logit_softcap,
    }
    if form == "ce":
        return linear_ce(rows, labels=labels, **options)
    return linear_divergence(rows, teacher_rows=teacher_rows, **options)
