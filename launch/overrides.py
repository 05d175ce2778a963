"""Dotted overrides of a run file: which field each names, and its value in the form that the field takes."""

import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from launch.suggestions import suggestion
from teacher_cache.errors import ConfigError

NOTHING = ("null", "None", "none")
"""Values that stand for a field without a value."""


def apply_overrides(
    values: dict[str, Any], overrides: Sequence[str], *, model: type[BaseModel], options: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the values of a run file with overrides in the place of some; what they hold is checked later.

    `--a.b VALUE`, `--a.b=VALUE` and, for a field with several values, `--a.b V1 V2`; a bare `--a.b` means true. Dashes
    and underscores in names are the same, entries of lists are counted from 0.

    Args:
        values: As read from the file; not changed.
        overrides: What stands behind the run file on the command line.
        model: What the values are to become.
        options: The command's own options, for suggestions.

    Raises:
        ConfigError: There is no such field, or no such entry.
    """
    for name, given in _split(overrides):
        path = name.replace("-", "_").split(".")
        field = _find(model, path, name=name, options=options)
        values = _with(values, path, _value(given, field=field, name=name), name=name)
    return values


def dotted_names(model: type[BaseModel], *, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every field that holds no fields itself; an entry of a list is called 0."""
    for name, field in model.model_fields.items():
        inner = inner_model(field.annotation)
        if inner is None:
            yield f"{prefix}{name}"
        else:
            index = ".0" if is_list(field.annotation) else ""
            yield from dotted_names(inner, prefix=f"{prefix}{name}{index}.")


def inner_model(annotation: Any) -> type[BaseModel] | None:
    """Return the model in an annotation: itself, or None or in a list; None where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, tuple, list):
        return next((found for part in get_args(annotation) if (found := inner_model(part)) is not None), None)
    return None


def is_list(annotation: Any) -> bool:
    """Tell whether a field takes several values, by number."""
    if get_origin(annotation) in (Union, types.UnionType):
        return any(map(is_list, get_args(annotation)))
    return get_origin(annotation) in (tuple, list)


def _split(overrides: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each name with the words behind it."""
    name, words = "", list[str]()
    for word in overrides:
        if word.startswith("--"):
            if name:
                yield name, words
            name, equals, first = word[2:].partition("=")
            words = [first] if equals else []
        elif name:
            words.append(word)
        else:
            raise ConfigError(f"unexpected argument {word!r}; overrides are written --dotted.name VALUE")
    if name:
        yield name, words


def _find(model: type[BaseModel], path: Sequence[str], *, name: str, options: Sequence[str]) -> FieldInfo:
    """Return the field that a path names."""
    field: FieldInfo | None = None
    inner: type[BaseModel] | None = model
    for part in path:
        if field is not None and is_list(field.annotation) and inner is not None and part.isdigit():
            field = FieldInfo(annotation=inner)
            continue
        if inner is None or part not in inner.model_fields:
            _refuse(model, name, options=options)
        field = inner.model_fields[part]
        inner = inner_model(field.annotation)
    assert field is not None
    return field


def _refuse(model: type[BaseModel], name: str, *, options: Sequence[str]) -> NoReturn:
    known = [f"--{known.replace('_', '-')}" for known in dotted_names(model)]
    hint = suggestion(f"--{name.replace('_', '-')}", [*options, *known])
    raise ConfigError(f"unknown option '--{name}'{hint}. `genrecal config example` lists all fields of a run file")


def _value(words: Sequence[str], *, field: FieldInfo, name: str) -> Any:
    annotation = field.annotation
    if not words:
        if annotation is not bool:
            raise ConfigError(f"--{name} needs a value")
        return True
    if len(words) == 1 and words[0] in NOTHING and type(None) in get_args(annotation):
        return None
    if len(words) == 1 and words[0][:1] in ("[", "{"):
        return _parsed(words[0], name=name)
    if is_list(annotation):
        return list(words)
    if len(words) > 1:
        raise ConfigError(f"--{name} takes one value, found {' '.join(words)}")
    return words[0] if inner_model(annotation) is None else _parsed(words[0], name=name)


def _parsed(text: str, *, name: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--{name}: {text!r} is not YAML") from error


def _with(values: Any, path: Sequence[str], value: Any, *, name: str) -> Any:
    """Return a copy of nested values in which the one at a path is another."""
    if not path:
        return value
    first, rest = path[0], path[1:]
    if isinstance(values, list) and first.isdigit():
        if int(first) >= len(values):
            raise ConfigError(f"--{name}: there is no entry {first}, the run file has {len(values)}")
        place = int(first)
        return [*values[:place], _with(values[place], rest, value, name=name), *values[place + 1 :]]
    if values is None or isinstance(values, Mapping):
        inner = dict(values or {})
        return {**inner, first: _with(inner.get(first), rest, value, name=name)}
    raise ConfigError(f"--{name}: the run file has no such field at {first!r}")
