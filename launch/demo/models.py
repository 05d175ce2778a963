"""Small Hugging Face model directories of true architectures: random weights, tokenizers trained on a corpus."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launch.demo.tokenizers import CHAT_FORMATS, TokenizerKind, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

Family = Literal["qwen2-vl", "internvl", "llava", "qwen2"]
IMAGE_STATISTICS = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Shape of one small model. Sizes are in features, patches in pixels."""

    family: Family
    """qwen2-vl, internvl and llava see images; qwen2 is text only."""
    tokenizer: TokenizerKind
    vocab_size: int
    """Rows of the embedding; the tokenizer has at most as many entries."""
    hidden_size: int = 64
    """Head size (hidden_size / num_heads) must be 32, 64, 80, 96, 112 or 128 for vLLM on a CPU."""
    intermediate_size: int = 128
    num_layers: int = 2
    num_heads: int = 2
    num_kv_heads: int = 2
    vision_hidden: int = 32
    vision_layers: int = 1
    vision_heads: int = 2
    patch_size: int = 4
    tile_size: int = 16
    """Side to which internvl resizes each tile and llava the image; qwen2-vl keeps the image's own size."""
    tiles: int = 1
    """Tiles per image (internvl); above 1 a thumbnail comes on top."""
    text_model: Literal["qwen2", "qwen3", "llama"] = "qwen2"
    """Body of internvl (llava's is always llama)."""
    initializer_range: float = 0.08
    rope_theta: float = 10000.0
    """Base of the text body's rotary frequencies. M-RoPE gives rows and columns the lower ones: at 10000 a model
    this small cannot tell neighbouring columns apart."""

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a tile."""
        return self.tile_size // self.patch_size


def create_model_directory(spec: ModelSpec, path: str | Path, *, corpus: Iterable[str], seed: int) -> None:
    """Write an ordinary Hugging Face directory: float32 weights, config, tokenizer, processor, chat template."""
    chat = CHAT_FORMATS[spec.family]
    tokenizer = train_tokenizer(spec.tokenizer, corpus=corpus, vocab_size=spec.vocab_size, chat=chat)
    config = CONFIGS[spec.family](spec, tokenizer)
    processor = None if spec.family == "qwen2" else build_processor(spec, tokenizer)
    save_random_model(config, path, tokenizer=tokenizer, processor=processor, seed=seed)


def save_random_model(
    config: "PreTrainedConfig",
    path: str | Path,
    *,
    tokenizer: "PreTrainedTokenizerFast",
    processor: Any | None,
    seed: int,
) -> None:
    """Write a model of a configuration with random weights; without a processor it takes text only."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig

    config.dtype = torch.float32
    auto = AutoModelForCausalLM if processor is None else AutoModelForImageTextToText
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
    )
    model.save_pretrained(path)
    (tokenizer if processor is None else processor).save_pretrained(path)


def build_processor(spec: ModelSpec, tokenizer: "PreTrainedTokenizerFast") -> Any:
    """Return the processor of the family, with the chat template."""
    import transformers

    template = CHAT_FORMATS[spec.family].template
    if spec.family == "qwen2-vl":
        factor = 2 * spec.patch_size
        sizes = {"patch_size": spec.patch_size, "merge_size": 2, "temporal_patch_size": 2}
        limits = {"size": {"shortest_edge": factor**2, "longest_edge": 64 * factor**2}}
        return transformers.Qwen2VLProcessor(
            transformers.Qwen2VLImageProcessor(**sizes, **limits, **IMAGE_STATISTICS),
            tokenizer,
            transformers.Qwen2VLVideoProcessor(**sizes, **limits, **IMAGE_STATISTICS, cap_pixels_per_frame=False),
            chat_template=template,
        )
    square = {"height": spec.tile_size, "width": spec.tile_size}
    if spec.family == "internvl":
        tiles = {"crop_to_patches": spec.tiles > 1, "min_patches": spec.tiles, "max_patches": spec.tiles}
        return transformers.InternVLProcessor(
            transformers.GotOcr2ImageProcessor(size=square, **tiles, **IMAGE_STATISTICS),
            tokenizer,
            transformers.InternVLVideoProcessor(size=square, **IMAGE_STATISTICS),
            image_seq_length=spec.patches_per_side**2 // 4,
            chat_template=template,
        )
    return transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(
            size=square, crop_size=square, resample=3, do_center_crop=False, **IMAGE_STATISTICS
        ),
        tokenizer,
        patch_size=spec.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def token_id(tokenizer: "PreTrainedTokenizerFast", token: str) -> int:
    """Return the id of a special token."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def text_sizes(spec: ModelSpec, tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
    """Return the arguments that every text configuration takes."""
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "max_position_embeddings": 4096,
        "initializer_range": spec.initializer_range,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta},
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _qwen2_vl_config(spec: ModelSpec, tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedConfig":
    from transformers import Qwen2VLConfig

    half = spec.hidden_size // spec.num_heads // 2
    section = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    rope = {"rope_type": "default", "rope_theta": spec.rope_theta, "mrope_section": section}
    return Qwen2VLConfig(
        text_config=text_sizes(spec, tokenizer) | {"rope_parameters": rope},
        vision_config={
            "depth": spec.vision_layers,
            "embed_dim": spec.vision_hidden,
            "hidden_size": spec.hidden_size,
            "num_heads": spec.vision_heads,
            "mlp_ratio": 2,
            "patch_size": spec.patch_size,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "initializer_range": spec.initializer_range,
        },
        image_token_id=token_id(tokenizer, "<|image_pad|>"),
        video_token_id=token_id(tokenizer, "<|video_pad|>"),
        vision_start_token_id=token_id(tokenizer, "<|vision_start|>"),
        vision_end_token_id=token_id(tokenizer, "<|vision_end|>"),
        tie_word_embeddings=False,
    )


def square_vision(spec: ModelSpec) -> dict[str, Any]:
    """Return the arguments of a vision tower that sees square tiles."""
    return {
        "hidden_size": spec.vision_hidden,
        "intermediate_size": 2 * spec.vision_hidden,
        "num_hidden_layers": spec.vision_layers,
        "num_attention_heads": spec.vision_heads,
        "image_size": spec.tile_size,
        "patch_size": spec.patch_size,
        "initializer_range": spec.initializer_range,
    }


def _internvl_config(spec: ModelSpec, tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedConfig":
    from transformers import InternVLConfig

    return InternVLConfig(
        text_config=text_sizes(spec, tokenizer) | {"model_type": spec.text_model},
        vision_config=square_vision(spec) | {"layer_scale_init_value": 1.0},
        image_token_id=token_id(tokenizer, "<IMG_CONTEXT>"),
        image_seq_length=spec.patches_per_side**2 // 4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )


def _llava_config(spec: ModelSpec, tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedConfig":
    from transformers import LlavaConfig

    return LlavaConfig(
        text_config=text_sizes(spec, tokenizer) | {"model_type": "llama"},
        vision_config=square_vision(spec) | {"model_type": "clip_vision_model", "projection_dim": spec.vision_hidden},
        image_token_index=token_id(tokenizer, "<image>"),
        image_seq_length=spec.patches_per_side**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def _qwen2_config(spec: ModelSpec, tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedConfig":
    from transformers import Qwen2Config

    return Qwen2Config(**text_sizes(spec, tokenizer))


CONFIGS: "dict[Family, Callable[[ModelSpec, PreTrainedTokenizerFast], PreTrainedConfig]]" = {
    "qwen2-vl": _qwen2_vl_config,
    "internvl": _internvl_config,
    "llava": _llava_config,
    "qwen2": _qwen2_config,
}
