"""What is read from a teacher's checkpoint without running it: its output head and the digests that identify it."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from safetensors import safe_open

from teacher_cache.config import TeacherConfig
from teacher_cache.errors import ConfigError, TeacherError
from teacher_cache.model_files import read_config, refuse_own_code
from teacher_cache.schema import TeacherHead

WEIGHT_PATTERN = "*.safetensors"
WEIGHT_INDEX = "model.safetensors.index.json"
CONFIG_FILES = ("config.json", "generation_config.json", WEIGHT_INDEX)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""What engines read where config.json does not say how the weights are quantized."""
CODE_FILES = ("**/*.py",)
"""Of a checkpoint that brings its own model or processor."""
SELF_DESCRIPTION = ("_name_or_path", "transformers_version")
"""Entries of config.json that say who wrote it, not what it is."""


def checkpoint_directory(config: TeacherConfig) -> Path:
    """Return the local directory of the checkpoint, fetched from the Hub when ``model`` is a repository id.

    Raises:
        ConfigError: There is no such checkpoint, or it asks for remote code that the config does not allow.
    """
    path = Path(config.model)
    if not path.is_dir():
        path = _download(config)
    if not (path / "config.json").is_file():
        raise ConfigError(f"no config.json in {path}: `cache.teacher.model` must be a Hugging Face model directory")
    refuse_own_code(path, trusted=config.trust_remote_code)
    return path


def torch_dtype(config: TeacherConfig) -> torch.dtype:
    """Return the teacher's element type."""
    return getattr(torch, config.dtype)


def attention_options(model_config: transformers.PreTrainedConfig) -> dict[str, str]:
    """Return the loading options that keep a model's attention as it was trained.

    The fused kernels of transformers leave a soft-cap on attention scores out without a word.
    """
    capped = getattr(model_config.get_text_config(), "attn_logit_softcapping", None) is not None
    return {"attn_implementation": "eager"} if capped else {}


def load_teacher_head(config: TeacherConfig) -> TeacherHead:
    """Read the output projection (the tied embedding where there is no lm_head) in the teacher's dtype.

    Raises:
        TeacherError: No tensor of the checkpoint, or several, could be the head.
    """
    directory = checkpoint_directory(config)
    text = transformers.AutoConfig.from_pretrained(
        directory, trust_remote_code=config.trust_remote_code
    ).get_text_config()
    names = {name: file for file in weight_files(directory) for name in _tensor_names(file)}
    name = _head_name(names, directory=directory)
    weight = _read_tensor(names[name], name)
    if tuple(weight.shape) != (text.vocab_size, text.hidden_size):
        raise TeacherError(
            f"{name} in {directory}: expected the shape {(text.vocab_size, text.hidden_size)} (vocabulary, hidden "
            f"size) that config.json states, found {tuple(weight.shape)}"
        )
    bias_name = name.removesuffix("weight") + "bias"
    bias = _read_tensor(names[bias_name], bias_name) if name.endswith("lm_head.weight") and bias_name in names else None
    dtype = torch_dtype(config)
    return TeacherHead(
        weight=weight.to(dtype),
        bias=None if bias is None else bias.to(dtype),
        logit_scale=_logit_scale(text),
        logit_softcap=getattr(text, "final_logit_softcapping", None),
    )


def teacher_identity(config: TeacherConfig) -> dict[str, str]:
    """Return digests of everything in the checkpoint that decides what the teacher computes."""
    directory = checkpoint_directory(config)
    raw_config = {key: value for key, value in read_config(directory).items() if key not in SELF_DESCRIPTION}
    optional = {
        "quantization": _present(directory, QUANTIZATION_FILES),
        "code": _present(directory, CODE_FILES) if config.trust_remote_code else [],
    }
    return {
        "dtype": config.dtype,
        "config": hashlib.sha256(json.dumps(raw_config, sort_keys=True).encode()).hexdigest(),
        "weights": digest_files(weight_files(directory)),
        **{name: digest_files(files) for name, files in optional.items() if files},
    }


def processing_identity(config: TeacherConfig) -> dict[str, str]:
    """Return digests of the teacher's tokenizer, image processor and chat template."""
    directory = checkpoint_directory(config)
    groups = {"tokenizer": TOKENIZER_FILES, "processor": PROCESSOR_FILES, "chat_template": TEMPLATE_FILES}
    return {group: digest_files(_present(directory, patterns)) for group, patterns in groups.items()}


def weight_files(directory: Path) -> list[Path]:
    """Return the checkpoint's safetensors files, sorted; those that the index names, where there is one.

    Raises:
        ConfigError: There are none.
    """
    index = directory / WEIGHT_INDEX
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [directory / name for name in sorted(set(names))]
    else:
        files = sorted(directory.glob(WEIGHT_PATTERN))
    if not files:
        raise ConfigError(f"no {WEIGHT_PATTERN} in {directory}: the teacher must be stored as safetensors")
    return files


def small_files(directory: Path, *, trusted: bool) -> list[Path]:
    """Return what decides beside the weights how a checkpoint works, its own code where that is trusted."""
    patterns = [*CONFIG_FILES, *TOKENIZER_FILES, *PROCESSOR_FILES, *TEMPLATE_FILES, *QUANTIZATION_FILES]
    return _present(directory, [*patterns, *(CODE_FILES if trusted else ())])


def digest_files(files: Sequence[Path]) -> str:
    """Return one SHA-256 (hex) over the names and contents of files."""
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(_file_digest, files))
    lines = [f"{digest}  {file.name}\n" for file, digest in zip(files, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _present(directory: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted(path for pattern in patterns for path in directory.glob(pattern))


def _download(config: TeacherConfig) -> Path:
    code = ["*.py"] if config.trust_remote_code else []
    wanted = [WEIGHT_PATTERN, "*.json", *TOKENIZER_FILES, *TEMPLATE_FILES, *code]
    try:
        return Path(huggingface_hub.snapshot_download(config.model, revision=config.revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"teacher {config.model!r} is neither a directory nor a repository that can be fetched: {error}"
        ) from error


def _tensor_names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _read_tensor(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


def _head_name(names: dict[str, Path], *, directory: Path) -> str:
    for suffix in ("lm_head.weight", "embed_tokens.weight"):
        found = [name for name in names if name.endswith(suffix)]
        if len(found) == 1:
            return found[0]
        if found:
            raise TeacherError(f"expected one tensor named ...{suffix} in {directory}, found {', '.join(found)}")
    raise TeacherError(
        f"no tensor named ...lm_head.weight or ...embed_tokens.weight in {directory}: the output head of this "
        "architecture is not known"
    )


def _logit_scale(text_config: Any) -> float:
    if getattr(text_config, "logit_scale", None) is not None:
        return float(text_config.logit_scale)
    if getattr(text_config, "logits_scaling", None) is not None:
        return 1.0 / float(text_config.logits_scaling)
    return 1.0
