"""Sizes of a teacher from its configuration alone: no weight is read, none is made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from teacher_cache.chat import Processor, load_processor
from teacher_cache.config import TeacherConfig
from teacher_cache.errors import ConfigError
from teacher_cache.model_files import local_copy, refuse_own_code


@dataclass(frozen=True, kw_only=True)
class TeacherSize:
    """What sizes and costs of a cache depend on."""

    hidden_size: int
    """Columns of a hidden row."""
    vocab_size: int
    """Rows of the output head."""
    parameters: int | None = None
    """Of the whole model, image tower and head included; tied ones count once. None where nobody needs them."""
    has_head_bias: bool = False


def local_directory(config: TeacherConfig) -> Path:
    """Return the directory of the teacher's configuration and tokenizer, without asking the network.

    Raises:
        ConfigError: It is neither a folder nor in the local copy of the Hub.
    """
    path = local_copy(config.model, revision=config.revision)
    if path is None:
        raise ConfigError(f"teacher {config.model!r} is no directory on this machine, and planning fetches nothing")
    if not (path / "config.json").is_file():
        raise ConfigError(f"no config.json in {path}, the directory of teacher {config.model!r}")
    refuse_own_code(path, trusted=config.trust_remote_code)
    return path


def load_local_processor(config: TeacherConfig) -> Processor:
    """Load the teacher's processor or tokenizer, without asking the network.

    Raises:
        ConfigError: Its files are not at hand, or it cannot serve.
    """
    directory = local_directory(config)
    try:
        return load_processor(str(directory), trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{directory} holds no tokenizer or processor that can be loaded: {error}") from error


def teacher_size(directory: Path, *, trust_remote_code: bool = False) -> TeacherSize:
    """Return the sizes of the model that a config.json describes, built on the meta device.

    Raises:
        ConfigError: transformers cannot build it.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, **options)
        text = config.get_text_config()
        auto: Any = transformers.AutoModelForCausalLM if text is config else transformers.AutoModelForImageTextToText
        with torch.device("meta"):
            model = auto.from_config(config, **options)
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(
            f"the config.json in {directory} describes no model that transformers can build: {error}"
        ) from error
    head = model.get_output_embeddings()
    return TeacherSize(
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        has_head_bias=getattr(head, "bias", None) is not None,
    )
