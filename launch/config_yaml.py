"""YAML of run and study files: read once, in which a key that stands twice in one place is an error."""

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator

from teacher_cache.errors import ConfigError


def _on_a_file_system(folder: str) -> str:
    if "://" in folder:
        raise ValueError(
            f"{folder!r} is a URI, but outputs are written to a folder of a file system; caches alone may be in an "
            "object store"
        )
    return folder


OutputFolder = Annotated[str, AfterValidator(_on_a_file_system)]
"""A folder for outputs. As a path, a URI would be a new folder under the working directory."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """The safe loader keeps the last of several equal keys and says nothing; this one refuses them."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping; its keys are still those of the text here, `<<` brings in others later."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in lines:
                raise ConfigError(f"line {line}: {key.value!r} stands in line {lines[name]} already; keep one of them")
            lines[name] = line
        return node


def read_yaml(path: str | Path, *, kind: str) -> tuple[Any, str]:
    """Return what a YAML file holds, and its text.

    Args:
        path: The file.
        kind: What it is, for errors: `run file`.

    Raises:
        ConfigError: The file is missing or is not YAML, or a key stands twice in one place.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        return _load(text), text
    except OSError as error:
        raise ConfigError(f"{kind} {path}: {error.strerror}") from error
    except ConfigError as error:
        raise ConfigError(f"{kind} {path}, {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{kind} {path} is not YAML: {error}") from error


def _load(text: str) -> Any:
    loader = _UniqueKeyLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
