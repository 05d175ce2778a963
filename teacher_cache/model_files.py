"""A model's directory before anything of it is loaded: where it is, its config.json, whether it brings code."""

import json
from pathlib import Path
from typing import Any

from teacher_cache.errors import ConfigError

CODE_ENTRY = "auto_map"
"""Names Python classes that ship with a checkpoint; a loader that obeys it runs the checkpoint's code."""
CODE_NAMING_FILES = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)


def local_copy(model: str, *, revision: str | None = None) -> Path | None:
    """Return the directory of a model on this machine, None where it would have to be fetched."""
    if Path(model).is_dir():
        return Path(model)
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None


def read_config(directory: Path) -> dict[str, Any]:
    """Return config.json."""
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))


def refuse_own_code(directory: Path, *, trusted: bool) -> None:
    """Check, before anything is loaded, that a checkpoint names no code of its own, unless that is trusted.

    Loaders refuse too, but have been talked out of it more than once.

    Raises:
        ConfigError: It does.
    """
    if trusted:
        return
    for name in CODE_NAMING_FILES:
        if (file := directory / name).is_file() and CODE_ENTRY in _entries(file):
            raise ConfigError(
                f"{directory} brings Python code of its own ({CODE_ENTRY} in {name}); set `trust_remote_code` of this "
                "model if you trust it, or use a checkpoint in the form that transformers knows"
            )


def _entries(file: Path) -> dict[str, Any]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    return entries if isinstance(entries, dict) else {}
