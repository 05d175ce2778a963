"""What the comparison methods need beyond the common stages.

``sft`` is the distill and finetune stages without a teacher. ``kd`` adds to the student's own cross-entropy the
divergence from the teacher's cached top-k log-probabilities (tier L), which needs one tokenizer for both.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from distill.batch import TopkTargets
from distill.losses import topk_forward_kl

CHUNK_ROWS = 1024


def head_topk_kl(
    rows: Float[Tensor, "tokens hidden"],
    *,
    weight: Float[Tensor, "vocab hidden"],
    topk: TopkTargets,
    bias: Float[Tensor, " vocab"] | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Float[Tensor, " tokens"]:
    """Return `topk_forward_kl` through a head, in row chunks that are computed again in the backward pass."""

    def chunk_loss(chunk: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
        logits = logit_scale * functional.linear(chunk, weight, bias).float()
        if logit_softcap is not None:
            logits = logit_softcap * torch.tanh(logits / logit_softcap)
        return topk_forward_kl(logits, ids, logprobs)

    chunks = zip(rows.split(CHUNK_ROWS), topk.ids.split(CHUNK_ROWS), topk.logprobs.split(CHUNK_ROWS), strict=True)
    return torch.cat([checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks])
