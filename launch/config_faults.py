"""Faults of a run file in words: the dotted path, the line where there is one, and what was probably meant."""

from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from launch.overrides import inner_model
from launch.suggestions import nearest

Path = Sequence[int | str]


def describe_faults(error: ValidationError, *, model: type[BaseModel], text: str = "") -> str:
    """Return one line per fault.

    Args:
        error: Of validating the values of a run file.
        model: What they were to become.
        text: The file, for line numbers.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader) if text else None
    faults = error.errors()
    return "\n".join(
        f"  {_place(root, fault['loc'])}{_describe(fault, model=model)}"
        for fault in faults
        if not _follows_from_another(fault, faults)
    )


def _follows_from_another(fault: Any, faults: Sequence[Any]) -> bool:
    """Tell whether a list only counts as too short because entries of it are faulty, which pydantic leaves out."""
    path = fault["loc"]
    return fault["type"] == "too_short" and any(
        len(other["loc"]) > len(path) and other["loc"][: len(path)] == path for other in faults
    )


def _describe(fault: Any, *, model: type[BaseModel]) -> str:
    path = fault["loc"]
    name = ".".join(map(str, path)) or "(whole file)"
    if fault["type"] != "extra_forbidden":
        return f"{name}: {fault['msg']}"
    known = [] if (owner := _model_at(model, path[:-1])) is None else list(owner.model_fields)
    before = "".join(f"{part}." for part in path[:-1])
    close = nearest(str(path[-1]), known)
    hint = f"; known here: {', '.join(known)}" if close is None else f", did you mean {f'{before}{close}'!r}?"
    return f"{name}: unknown key{hint}"


def _model_at(model: type[BaseModel] | None, path: Path) -> type[BaseModel] | None:
    for part in path:
        if model is None or isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        model = None if field is None else inner_model(field.annotation)
    return model


def _place(root: yaml.Node | None, path: Path) -> str:
    """Return `line 12: ` of the deepest part of a path that the file has."""
    mark = None
    node = root
    for part in path:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
            if not found:
                break
            mark, node = found[0][0].start_mark, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            mark = node.start_mark
        else:
            break
    return "" if mark is None else f"line {mark.line + 1}: "
