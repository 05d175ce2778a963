"""Decoder blocks and rotary embedding of the student's own family, with fresh weights."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig

from recalibrator.attention import PER_SAMPLE_SDPA
from recalibrator.config import RecalibratorConfig

# What a rotary embedding keeps from the student's: its base and the shape of its frequencies. Length scaling is
# dropped: "dynamic" kinds would make one sample's output depend on the longest sample beside it.
_ROPE_KEYS = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")


@dataclass(frozen=True, kw_only=True)
class StudentBlocks:
    """What the Recalibrator takes from a text model of the student's family."""

    layers: nn.ModuleList
    rotary: nn.Module
    config: PreTrainedConfig
    """The layers' own: its attention implementation is looked up at every call."""


def build_student_blocks(config: RecalibratorConfig) -> StudentBlocks:
    """Build the student family's text model, with next to no vocabulary, and take its layers and rotary embedding."""
    text_config = config.student_config.get_text_config()
    rope = _plain_rope(text_config, theta=config.rope_theta)
    try:
        block_config = _block_config(text_config, num_blocks=config.num_blocks, rope=rope)
        body = AutoModel.from_config(block_config, dtype=torch.get_default_dtype())
    except Exception as error:
        # what a family lacks shows in errors of any kind
        raise ValueError(
            f"cannot build Recalibrator blocks of model type {text_config.model_type!r}: expected a text model of "
            f"{config.num_blocks} layers with full attention through an attention function that is chosen, found "
            f"{type(error).__name__}: {str(error).partition('. ')[0]}"
        ) from error
    layers, rotary = getattr(body, "layers", None), getattr(body, "rotary_emb", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(rotary, nn.Module):
        raise ValueError(  # noqa: TRY004 - the config is at fault, not the type of an argument
            f"cannot build Recalibrator blocks of model type {text_config.model_type!r}: expected a text model with "
            f"`layers` and `rotary_emb`, found {type(body).__name__}"
        )
    if not body._can_set_attn_implementation():
        raise ValueError(
            f"cannot build Recalibrator blocks of model type {text_config.model_type!r}: expected attention through "
            f"transformers' attention functions, found attention of its own in {type(body).__name__}, which would "
            "mix the samples of a packed row"
        )
    return StudentBlocks(layers=layers, rotary=rotary, config=body.config)


def _block_config(text_config: PreTrainedConfig, *, num_blocks: int, rope: dict[str, Any]) -> PreTrainedConfig:
    """Copy the student's text config for full causal attention at another depth."""
    block_config = deepcopy(text_config)
    overrides: dict[str, Any] = {
        "num_hidden_layers": num_blocks,
        "vocab_size": 1,
        "pad_token_id": None,
        "use_cache": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": ["full_attention"] * num_blocks,
    }
    for name, value in overrides.items():
        if hasattr(block_config, name):
            setattr(block_config, name, value)
    block_config.rope_parameters = rope
    block_config._attn_implementation = PER_SAMPLE_SDPA
    return block_config


def _plain_rope(config: PreTrainedConfig, *, theta: float | None) -> dict[str, Any]:
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" not in rope:
        raise ValueError(
            f"cannot build Recalibrator blocks of model type {config.model_type!r}: expected one rotary embedding "
            f"with a rope_theta for all layers, found rope_parameters {rope!r}"
        )
    own_base = {} if theta is None else {"rope_theta": theta}
    return {"rope_type": "default"} | {key: rope[key] for key in _ROPE_KEYS if key in rope} | own_base
