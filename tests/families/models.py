"""Model families with tiny random configurations of their true architecture classes, written as they are published."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from launch.demo.models import (
    CONFIGS,
    IMAGE_STATISTICS,
    ModelSpec,
    build_processor,
    save_random_model,
    square_vision,
    text_sizes,
    token_id,
)
from launch.demo.tokenizers import CHAT_FORMATS, CHATML_TEMPLATE, ChatFormat, train_tokenizer
from tests.conftest import CORPUS

Configure: TypeAlias = Callable[[ModelSpec, PreTrainedTokenizerFast], PreTrainedConfig]
MakeProcessor: TypeAlias = Callable[[ModelSpec, PreTrainedTokenizerFast], Any]
Size: TypeAlias = tuple[int, int]
"""Width and height in pixels."""

SMALL, LARGE = (16, 16), (40, 24)
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA3 = ChatFormat(
    end_of_turn="<|eot_id|>",
    pad="<|finetune_right_pad_id|>",
    image="<|image|>",
    template=LLAMA3_TEMPLATE,
    bos="<|begin_of_text|>",
    others=("<|start_header_id|>", "<|end_header_id|>"),
)
ONEVISION = replace(
    CHAT_FORMATS["qwen2"],
    image="<image>",
    template=CHATML_TEMPLATE.replace("IMAGE", "<image>\n"),
    others=("<|im_start|>", "<video>"),
)
TEXT = CHAT_FORMATS["qwen2"]

BASE = ModelSpec(
    family="qwen2-vl",
    tokenizer="byte-bpe",
    vocab_size=384,
    hidden_size=128,
    intermediate_size=192,
    num_heads=4,
    num_kv_heads=2,
    vision_layers=2,
    vision_hidden=64,
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family: how to write a tiny model of it, and what its checks expect."""

    spec: ModelSpec
    chat: ChatFormat
    configure: Configure
    make_processor: MakeProcessor | None = None
    image_tokens: Mapping[Size, int] = field(default_factory=dict)
    """Tokens that an image of a size becomes, worked out by hand; empty for text-only families."""
    published_name: Callable[[str], str] | None = None
    """Turns a tensor's name as transformers saves it into the one in published checkpoints, where they differ."""

    @property
    def has_images(self) -> bool:
        """Whether the family sees images."""
        return self.make_processor is not None


def write_family(family: Family, path: Path) -> None:
    """Write a Hugging Face directory in the layout of the family's published checkpoints."""
    tokenizer = train_tokenizer(
        family.spec.tokenizer, corpus=CORPUS, vocab_size=family.spec.vocab_size, chat=family.chat
    )
    processor = None if family.make_processor is None else family.make_processor(family.spec, tokenizer)
    save_random_model(family.configure(family.spec, tokenizer), path, tokenizer=tokenizer, processor=processor, seed=7)
    if family.published_name is not None:
        file = path / "model.safetensors"
        weights = {family.published_name(name): tensor for name, tensor in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})


def clip_as_published(name: str) -> str:
    """Put back the module that transformers 5 takes out of the names of CLIP and SigLIP towers."""
    return re.sub(r"(?<=vision_tower\.)(?!vision_model\.)", "vision_model.", name)


def _mrope(spec: ModelSpec, *, head_dim: int, **options: Any) -> dict[str, Any]:
    half = head_dim // 2
    side = half * 3 // 8
    section = [half - 2 * side, side, side]
    return {"rope_type": "default", "rope_theta": spec.rope_theta, "mrope_section": section, **options}


def _qwen_vision_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{key}_token_id": token_id(tokenizer, f"<|{name}|>") for key, name in names.items()}


def _qwen2_5_vl(spec: ModelSpec, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    rope = _mrope(spec, head_dim=spec.hidden_size // spec.num_heads)
    return transformers.Qwen2_5_VLConfig(
        text_config=text_sizes(spec, tokenizer) | {"rope_parameters": rope},
        vision_config={
            "depth": spec.vision_layers,
            "hidden_size": spec.vision_hidden,
            "intermediate_size": 2 * spec.vision_hidden,
            "num_heads": spec.vision_heads,
            "patch_size": spec.patch_size,
            "window_size": 4 * spec.patch_size,
            "fullatt_block_indexes": [spec.vision_layers - 1],
            "out_hidden_size": spec.hidden_size,
            "initializer_range": spec.initializer_range,
        },
        **_qwen_vision_ids(tokenizer),
    )


def _qwen3_vl(spec: ModelSpec, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    rope = _mrope(spec, head_dim=64, mrope_interleaved=True)
    return transformers.Qwen3VLConfig(
        text_config=text_sizes(spec, tokenizer) | {"rope_parameters": rope, "head_dim": 64},
        vision_config={
            "depth": spec.vision_layers,
            "hidden_size": spec.vision_hidden,
            "intermediate_size": 2 * spec.vision_hidden,
            "num_heads": spec.vision_heads,
            "patch_size": spec.patch_size,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
            "out_hidden_size": spec.hidden_size,
            "initializer_range": spec.initializer_range,
        },
        **_qwen_vision_ids(tokenizer),
    )


def _internvl_with_large_tower(spec: ModelSpec, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """As the InternVLs from 38B on: the tower of 6B, which has other norms and no biases, and a Qwen3 body."""
    config = CONFIGS["internvl"](spec, tokenizer)
    tower = {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False}
    config.vision_config.update(tower)
    return config


def _llava(spec: ModelSpec, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    config = CONFIGS["llava"](spec, tokenizer)
    config.vision_feature_layer = -2
    return config


def _llava_onevision(spec: ModelSpec, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    return transformers.LlavaOnevisionConfig(
        text_config=text_sizes(spec, tokenizer) | {"model_type": "qwen2"},
        vision_config=square_vision(spec) | {"model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=token_id(tokenizer, "<image>"),
        video_token_index=token_id(tokenizer, "<video>"),
        image_grid_pinpoints=_pinpoints(spec),
        vision_aspect_ratio="anyres_max_9",
    )


def _text(config_class: type[PreTrainedConfig], **options: Any) -> Configure:
    return lambda spec, tokenizer: config_class(**text_sizes(spec, tokenizer) | options)


def _qwen_processor(processor_class: Any, video_processor_class: Any) -> MakeProcessor:
    def make(spec: ModelSpec, tokenizer: PreTrainedTokenizerFast) -> Any:
        base = build_processor(replace(spec, family="qwen2-vl"), tokenizer)
        sizes = {"patch_size": spec.patch_size, "merge_size": 2, "temporal_patch_size": 2}
        video = video_processor_class(**sizes, size=base.image_processor.size, **IMAGE_STATISTICS)
        return processor_class(base.image_processor, tokenizer, video, chat_template=base.chat_template)

    return make


def _internvl_processor(spec: ModelSpec, tokenizer: PreTrainedTokenizerFast) -> Any:
    processor = build_processor(replace(spec, tiles=4), tokenizer)
    processor.image_processor.min_patches = 1
    return processor


def _onevision_processor(spec: ModelSpec, tokenizer: PreTrainedTokenizerFast) -> Any:
    square = {"height": spec.tile_size, "width": spec.tile_size}
    return transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(
            size=square, image_grid_pinpoints=_pinpoints(spec), **IMAGE_STATISTICS
        ),
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size=square, **IMAGE_STATISTICS),
        num_image_tokens=spec.patches_per_side**2,
        vision_feature_select_strategy="full",
        chat_template=ONEVISION.template,
    )


def _pinpoints(spec: ModelSpec) -> list[list[int]]:
    sides = (spec.tile_size, 2 * spec.tile_size)
    return [[height, width] for height in sides for width in sides]


# 4 pixels a patch, 2 x 2 patches a token, sides rounded to 8: 2 x 2 and 5 x 3 tokens
QWEN_TOKENS = {SMALL: 2 * 2, LARGE: 5 * 3}
# tiles of 16 pixels and 4 tokens; 40 x 24 is nearest to 2 x 1 tiles, with a thumbnail
INTERNVL_TOKENS = {SMALL: 4, LARGE: (2 + 1) * 4}
# always 4 x 4 patches, a token each
LLAVA_TOKENS = {SMALL: 16, LARGE: 16}
# 16 of the whole; 4 x 4 and 4 line ends of one tile; of 2 x 2 tiles (8 x 8) the 5 rows with content, a line end each
ONEVISION_TOKENS = {SMALL: 16 + 4 * 4 + 4, LARGE: 16 + 8 * 4 + 4}

INTERNVL = Family(
    spec=replace(BASE, family="internvl"),
    chat=CHAT_FORMATS["internvl"],
    configure=CONFIGS["internvl"],
    make_processor=_internvl_processor,
    image_tokens=INTERNVL_TOKENS,
)
QWEN2_VL = Family(
    spec=BASE,
    chat=CHAT_FORMATS["qwen2-vl"],
    configure=CONFIGS["qwen2-vl"],
    make_processor=build_processor,
    image_tokens=QWEN_TOKENS,
)

FAMILIES = {
    "qwen2-vl": QWEN2_VL,
    "qwen2.5-vl": replace(
        QWEN2_VL,
        configure=_qwen2_5_vl,
        make_processor=_qwen_processor(transformers.Qwen2_5_VLProcessor, transformers.Qwen2VLVideoProcessor),
    ),
    "qwen3-vl": replace(
        QWEN2_VL,
        configure=_qwen3_vl,
        make_processor=_qwen_processor(transformers.Qwen3VLProcessor, transformers.Qwen3VLVideoProcessor),
    ),
    "internvl-qwen2": INTERNVL,
    "internvl-llama": replace(
        INTERNVL, spec=replace(INTERNVL.spec, text_model="llama", tokenizer="unigram", vocab_size=224)
    ),
    "internvl-qwen3": replace(
        INTERNVL, spec=replace(INTERNVL.spec, text_model="qwen3"), configure=_internvl_with_large_tower
    ),
    "llava": Family(
        spec=replace(BASE, family="llava", tokenizer="metaspace-bpe", vocab_size=256),
        chat=CHAT_FORMATS["llava"],
        configure=_llava,
        make_processor=build_processor,
        image_tokens=LLAVA_TOKENS,
        published_name=clip_as_published,
    ),
    "llava-onevision": Family(
        spec=BASE,
        chat=ONEVISION,
        configure=_llava_onevision,
        make_processor=_onevision_processor,
        image_tokens=ONEVISION_TOKENS,
        published_name=clip_as_published,
    ),
    "qwen2": Family(spec=BASE, chat=TEXT, configure=_text(transformers.Qwen2Config)),
    "qwen3": Family(spec=BASE, chat=TEXT, configure=_text(transformers.Qwen3Config, head_dim=64)),
    "llama": Family(spec=BASE, chat=LLAMA3, configure=_text(transformers.LlamaConfig)),
}

HEADS = {
    "granite": Family(
        spec=BASE,
        chat=TEXT,
        configure=_text(transformers.GraniteConfig, logits_scaling=4.0, residual_multiplier=0.5),
    ),
    "cohere": Family(
        spec=BASE,
        chat=TEXT,
        configure=_text(transformers.CohereConfig, logit_scale=0.25, tie_word_embeddings=True),
    ),
    "gemma2": Family(
        spec=BASE,
        chat=TEXT,
        configure=_text(
            transformers.Gemma2Config,
            final_logit_softcapping=3.0,
            head_dim=32,
            query_pre_attn_scalar=32,
            tie_word_embeddings=True,
        ),
    ),
}
"""Families whose heads scale or cap their logits, at values that change these small logits much."""
