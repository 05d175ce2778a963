"""Causal attention within each sample of a packed row, through the attention functions that transformers registers.

No mask is built: on a GPU with flash-attention the kernel for ragged sequences gets the samples' offsets, elsewhere
torch's kernel runs once per sample over its part of the packed queries, keys and values.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from recalibrator.joint_sequence import JointSequence

PER_SAMPLE_SDPA = "per_sample_sdpa"
FLASH_ATTENTION = "flash_attention_2"


class AttentionChoice(NamedTuple):
    """How the blocks attend over one batch."""

    implementation: str
    """Name among transformers' attention functions."""
    arguments: dict[str, Any]
    """What that function must be told of the batch, as keyword arguments of a decoder block."""


def choose_attention(hidden_states: Tensor, plan: JointSequence) -> AttentionChoice:
    """Choose the attention function for rows of this device and dtype."""
    if flash_attention_runs(hidden_states):
        longest = max(plan.lengths)
        return AttentionChoice(
            FLASH_ATTENTION,
            {
                "cu_seq_lens_q": plan.offsets,
                "cu_seq_lens_k": plan.offsets,
                "max_length_q": longest,
                "max_length_k": longest,
            },
        )
    return AttentionChoice(PER_SAMPLE_SDPA, {"sample_lengths": plan.lengths})


def flash_attention_runs(hidden_states: Tensor) -> bool:
    """Tell whether flash-attention is installed and takes rows of this device and dtype."""
    half = hidden_states.dtype in (torch.float16, torch.bfloat16)
    return hidden_states.is_cuda and half and is_flash_attn_2_available()


def per_sample_sdpa(
    module: nn.Module,
    query: Float[Tensor, "1 heads joint_tokens head_dim"],
    key: Float[Tensor, "1 key_heads joint_tokens head_dim"],
    value: Float[Tensor, "1 key_heads joint_tokens value_dim"],
    attention_mask: None,
    *,
    sample_lengths: Sequence[int],
    **kwargs: Any,
) -> tuple[Float[Tensor, "1 joint_tokens heads value_dim"], None]:
    """Attend within each sample: one call for samples of one length, else one call per sample.

    ``split`` and not slices: the gradient of a slice is as long as the whole row, for every sample.
    """
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if len(set(sample_lengths)) == 1:
        folded = [_fold(rows, len(sample_lengths)) for rows in (query, key, value)]
        return sdpa(module, *folded, attention_mask, **kwargs)[0].flatten(0, 1)[None], None
    parts = zip(*(rows.split(list(sample_lengths), dim=2) for rows in (query, key, value)), strict=True)
    return torch.cat([sdpa(module, *part, attention_mask, **kwargs)[0] for part in parts], dim=1), None


def _fold(
    rows: Float[Tensor, "1 heads joint_tokens width"], num_samples: int
) -> Float[Tensor, "samples heads tokens width"]:
    return rows[0].unflatten(1, (num_samples, -1)).transpose(0, 1)


ALL_ATTENTION_FUNCTIONS.register(PER_SAMPLE_SDPA, per_sample_sdpa)
