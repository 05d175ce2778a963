"""A student's forward pass over all samples of a micro-batch in one row, without padding between them.

The row has no attention mask; position ids that begin anew say where a sample begins, and transformers keeps samples
apart by them, in its masks as in flash attention.
"""

from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor

PACKED_FAMILIES = frozenset(
    {
        *("llama", "qwen2", "qwen3", "granite", "cohere"),
        *("internvl", "llava", "llava_onevision"),
        *("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "qwen3_vl", "qwen3_vl_text"),
    }
)
"""Model types whose packed hidden states equal the padded ones, as the tests of the families show; others are padded.
A model counts when both its own type and that of its text model do."""


def can_pack(config: transformers.PreTrainedConfig) -> bool:
    """Return whether a model keeps packed samples apart."""
    return {config.model_type, config.get_text_config().model_type} <= PACKED_FAMILIES


def packed_hidden_state(
    model: transformers.PreTrainedModel,
    input_ids: Int[Tensor, "batch student_tokens"],
    *,
    attention_mask: Int[Tensor, "batch student_tokens"],
    model_inputs: dict[str, Tensor],
) -> Float[Tensor, "batch student_tokens student_hidden"]:
    """Return what a padded forward pass returns, zeros in place of padding."""
    kept = attention_mask.bool()
    position_ids = _position_ids(model, input_ids, attention_mask=attention_mask, model_inputs=model_inputs)
    inputs = {
        name: value[kept][None] if name.endswith("token_type_ids") else value for name, value in model_inputs.items()
    }
    row = model.base_model(
        input_ids=input_ids[kept][None], position_ids=position_ids, use_cache=False, return_dict=True, **inputs
    ).last_hidden_state[0]
    padded = row.new_zeros(*input_ids.shape, row.shape[-1])
    return padded.masked_scatter(kept[..., None], row)


def _position_ids(
    model: transformers.PreTrainedModel,
    input_ids: Int[Tensor, "batch student_tokens"],
    *,
    attention_mask: Int[Tensor, "batch student_tokens"],
    model_inputs: dict[str, Tensor],
) -> Int[Tensor, "*planes 1 tokens"]:
    kept = attention_mask.bool()
    in_text = (attention_mask.cumsum(1) - 1)[kept][None]
    if not hasattr(model.base_model, "get_rope_index"):
        return in_text
    in_space = in_text.expand(3, 1, -1)
    if "image_grid_thw" in model_inputs:
        rope_index: Any = model.base_model.get_rope_index
        indices, _ = rope_index(
            input_ids,
            attention_mask=attention_mask,
            image_grid_thw=model_inputs["image_grid_thw"],
            mm_token_type_ids=model_inputs["mm_token_type_ids"],
        )
        in_space = indices[:, kept][:, None]
    # the first plane keeps the samples apart, the others turn the queries and keys
    return torch.cat([in_text[None], in_space])
