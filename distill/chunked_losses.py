"""Cross-entropy and divergences through a large output head, without ever holding the logits of all tokens.

A few tokens at a time (`distill.logit_blocks`), with the gradient made ahead (`distill.linear_losses`): as many
products with the weight as a dense computation, in memory that does not grow with tokens x vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from distill.divergences import FORWARD_KL, Divergence
from distill.linear_head import LinearHead, accumulation_dtype
from distill.linear_losses import LinearLosses, Settings, WeightedLosses
from distill.logit_blocks import DEFAULT_CHUNKS, ChunkSizes
from distill.loss_inputs import RowInputs, ValueCheck, check_shapes
from distill.teacher_terms import Targets

__all__ = [
    "DEFAULT_CHUNKS",
    "ChunkSizes",
    "TokenLosses",
    "WeightedTokenLosses",
    "accumulation_dtype",
    "linear_ce",
    "linear_ce_kl",
    "linear_divergence",
    "weighted_ce_kl",
]


class TokenLosses(NamedTuple):
    """Nats per token, unreduced. A tuple, so that ZeRO-3's module hooks see the tensors inside."""

    ce_loss: Float[Tensor, " tokens"]
    """``-log p(label)`` under the rows' softmax."""
    kl_loss: Float[Tensor, " tokens"]
    """``KL(teacher || rows)``, or whatever divergence was asked for."""


class WeightedTokenLosses(NamedTuple):
    """Nats per token, unreduced: a loss, and its terms without a gradient."""

    loss: Float[Tensor, " tokens"]
    """``ce_weight * ce_loss + kl_weight * kl_loss``."""
    ce_loss: Float[Tensor, " tokens"]
    """As in `TokenLosses`."""
    kl_loss: Float[Tensor, " tokens"]
    """As in `TokenLosses`."""


def linear_ce_kl(
    rows: Float[Tensor, "tokens hidden"],
    *,
    weight: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, " tokens"],
    teacher_rows: Float[Tensor, "tokens teacher_hidden"] | None = None,
    topk_ids: Int[Tensor, "tokens k"] | None = None,
    topk_logprobs: Float[Tensor, "tokens k"] | None = None,
    bias: Float[Tensor, " vocab"] | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    teacher_head: LinearHead | None = None,
    divergence: Divergence = FORWARD_KL,
    kl_weight: float = 1.0,
    sample_ids: Sequence[str] | None = None,
    chunks: ChunkSizes = DEFAULT_CHUNKS,
) -> TokenLosses:
    """Return both distillation terms of GenRecal through the frozen teacher head.

    Formula: ``s = H(rows)``, ``t = H(teacher_rows)``, ``H(x) = softcap(logit_scale * (x @ weight.T + bias))``,
    ``softcap(u) = logit_softcap * tanh(u / logit_softcap)``; ``ce = lse(s) - s[label]`` and
    ``kl = sum_v softmax(t)_v (log softmax(t)_v - log softmax(s)_v)``. Softmax is applied inside.
    Why: at 152k entries the logits of 200 answer tokens alone are 122 MB per sample, several times over.
    Source: arXiv 2506.15681, L_ar and L_reg; the online softmax is arXiv 1805.02867.

    The gradient reaches ``rows`` only and is exact for any incoming weight per token and per term.

    Args:
        rows: Recalibrated rows, or a student's own.
        weight: Of the head that reads the rows; frozen, like everything of the teacher.
        labels: Ids in the head's vocabulary.
        teacher_rows: Cached rows of the teacher. Without them, the top-k of tier L:
        topk_ids: The teacher's most likely entries.
        topk_logprobs: Their log-probabilities, over the whole vocabulary (the log-sum-exp is subtracted already). All
            other entries count as one bucket, as in `topk_forward_kl`; the temperature acts on these k + 1 masses.
        bias: Of the head.
        logit_scale: Of the head.
        logit_softcap: Of the head.
        teacher_head: Reads ``teacher_rows``; by default the rows' own head.
        divergence: Its kind and temperature; the cross-entropy stays at temperature 1.
        kl_weight: Weight of ``kl_loss`` beside ``ce_loss`` in the loss that will be differentiated. Another weighting
            is exact too, but computes the logits of the tokens concerned a second time.
        sample_ids: The sample of each row, for errors.
        chunks: How much of the logits exists at a time.

    Raises:
        ValueError: Shapes that do not fit, labels outside the vocabulary, rows that are not finite.
    """
    head = LinearHead(weight=weight, bias=bias, logit_scale=logit_scale, logit_softcap=logit_softcap)
    inputs = RowInputs(
        rows=rows,
        labels=labels,
        teacher_rows=teacher_rows,
        topk_ids=topk_ids,
        topk_logprobs=topk_logprobs,
        sample_ids=sample_ids,
    )
    ce_loss, kl_loss = _losses(
        inputs, head, teacher_head, divergence=divergence, divergence_weight=kl_weight, chunks=chunks
    )
    return TokenLosses(ce_loss, kl_loss)


def weighted_ce_kl(
    rows: Float[Tensor, "tokens hidden"],
    *,
    teacher_rows: Float[Tensor, "tokens hidden"],
    head: LinearHead,
    labels: Int[Tensor, " tokens"],
    ce_weight: float = 1.0,
    kl_weight: float = 1.0,
    sample_ids: Sequence[str] | None = None,
    chunks: ChunkSizes = DEFAULT_CHUNKS,
) -> WeightedTokenLosses:
    """Return the weighted sum of the terms of `linear_ce_kl`, and both without a gradient.

    Why: whatever the weights, 0 included, one gradient is made while the logits exist. Of two terms that come in with a
    weight each, the backward pass has to look for tokens weighted otherwise than foreseen, which waits for the device.
    Source: as `linear_ce_kl`.
    """
    inputs = RowInputs(
        rows=rows, labels=labels, teacher_rows=teacher_rows, topk_ids=None, topk_logprobs=None, sample_ids=sample_ids
    )
    check, targets = _checked(inputs, head, None, divergence=FORWARD_KL)
    losses = WeightedLosses.apply(rows, head, targets, (ce_weight, kl_weight), chunks)
    check.raise_if_bad()
    return WeightedTokenLosses(*losses)


def linear_divergence(
    rows: Float[Tensor, "tokens hidden"],
    *,
    weight: Float[Tensor, "vocab hidden"],
    teacher_rows: Float[Tensor, "tokens teacher_hidden"] | None = None,
    topk_ids: Int[Tensor, "tokens k"] | None = None,
    topk_logprobs: Float[Tensor, "tokens k"] | None = None,
    bias: Float[Tensor, " vocab"] | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    teacher_head: LinearHead | None = None,
    divergence: Divergence = FORWARD_KL,
    sample_ids: Sequence[str] | None = None,
    chunks: ChunkSizes = DEFAULT_CHUNKS,
) -> Float[Tensor, " tokens"]:
    """Return the divergence between teacher and rows through a frozen head, without cross-entropy.

    Formula: `Divergence` of the softmaxes; the arguments are those of `linear_ce_kl`. Nats per token, unreduced.
    Why: same-tokenizer distillation and the KL-only form of the regularization at a vocabulary whose logits do not fit.
    Source: forward KL arXiv 1503.02531, reverse KL arXiv 2306.08543, Jensen-Shannon arXiv 2306.13649.
    """
    head = LinearHead(weight=weight, bias=bias, logit_scale=logit_scale, logit_softcap=logit_softcap)
    inputs = RowInputs(
        rows=rows,
        labels=None,
        teacher_rows=teacher_rows,
        topk_ids=topk_ids,
        topk_logprobs=topk_logprobs,
        sample_ids=sample_ids,
    )
    return _losses(inputs, head, teacher_head, divergence=divergence, divergence_weight=1.0, chunks=chunks)[1]


def linear_ce(
    rows: Float[Tensor, "tokens hidden"],
    *,
    weight: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, " tokens"],
    bias: Float[Tensor, " vocab"] | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    sample_ids: Sequence[str] | None = None,
    chunks: ChunkSizes = DEFAULT_CHUNKS,
) -> Float[Tensor, " tokens"]:
    """Return the cross-entropy of each token through a linear head: nats per token, unreduced.

    Formula: ``lse(s) - s[label]`` with ``s = softcap(logit_scale * (rows @ weight.T + bias))``; softmax inside.
    Why: the student's own loss at a vocabulary whose logits do not fit. Gradients reach ``rows``, ``weight`` and
    ``bias``, each where it requires one; a trained head makes the backward pass compute the logits again, because the
    weight's gradient sums over tokens whose incoming weights the forward pass does not know. Under ZeRO-3 call it
    inside the engine's forward, where the weight exists.
    Source: the cross-entropy of arXiv 2411.09009 (cut cross-entropy), here in plain torch.
    """
    head = LinearHead(weight=weight, bias=bias, logit_scale=logit_scale, logit_softcap=logit_softcap)
    inputs = RowInputs(
        rows=rows, labels=labels, teacher_rows=None, topk_ids=None, topk_logprobs=None, sample_ids=sample_ids
    )
    return _losses(inputs, head, None, divergence=None, divergence_weight=1.0, chunks=chunks)[0]


def _losses(
    inputs: RowInputs,
    head: LinearHead,
    teacher_head: LinearHead | None,
    *,
    divergence: Divergence | None,
    divergence_weight: float,
    chunks: ChunkSizes,
) -> tuple[Any, Any]:
    """Check everything, then compute. Returns CE and divergence, None where not asked for."""
    check, targets = _checked(inputs, head, teacher_head, divergence=divergence)
    settings = Settings(
        logit_scale=head.logit_scale,
        logit_softcap=head.logit_softcap,
        divergence_weight=divergence_weight,
        chunks=chunks,
    )
    losses = LinearLosses.apply(inputs.rows, head.weight, head.bias, targets, settings)
    check.raise_if_bad()
    return losses


def _checked(
    inputs: RowInputs, head: LinearHead, teacher_head: LinearHead | None, *, divergence: Divergence | None
) -> tuple[ValueCheck, Targets]:
    """Check shapes, and values where that waits for nothing; the check of others is to be read after the losses."""
    if divergence is not None:
        _check_teacher(inputs, head, teacher_head)
    check_shapes(inputs, head=head, teacher_head=teacher_head or head)
    check = ValueCheck(inputs, vocab_size=head.vocab_size)
    if check.is_ready:
        check.raise_if_bad()
    targets = Targets(
        labels=None if inputs.labels is None else inputs.labels.long(),
        divergence=divergence,
        teacher_rows=inputs.teacher_rows,
        teacher_head=teacher_head,
        topk_ids=inputs.topk_ids,
        topk_logprobs=inputs.topk_logprobs,
    )
    return check, targets


def _check_teacher(inputs: RowInputs, head: LinearHead, teacher_head: LinearHead | None) -> None:
    frozen = [inputs.teacher_rows, inputs.topk_logprobs, head.weight, head.bias]
    frozen += [] if teacher_head is None else [teacher_head.weight, teacher_head.bias]
    if any(tensor is not None and tensor.requires_grad for tensor in frozen):
        raise ValueError(
            "a divergence gives no gradient to the teacher: expected frozen teacher_rows, weight and bias, found "
            "requires_grad=True. Freeze the teacher's head and detach its rows"
        )
    if (inputs.teacher_rows is None) == (inputs.topk_ids is None):
        raise ValueError(
            "a divergence needs one teacher: expected either teacher_rows, or topk_ids with topk_logprobs, found "
            f"{'neither' if inputs.teacher_rows is None else 'both'}"
        )
