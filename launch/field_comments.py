"""Comments of run files, made from the fields' own docstrings: ``python -m launch.field_comments FILE ...``.

Made lines start with ``#:`` and are written anew each time; all other lines stay as they are.
"""

import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from launch.overrides import inner_model, is_list
from launch.run_config import RunConfig

MARK = "#:"
WIDTH = 118
REQUIRED = {
    "output_dir": "runs/mine",
    "uri": "runs/mine/cache",
    "model": "Qwen/Qwen2-VL-72B-Instruct",
    "path": "data/train.parquet",
    "data": "data/held-out.parquet",
    "source": "data/original.parquet",
    "name": "small",
    "secret": "tokens",
    "key": "hf",
}
"""What stands for a field that has no default."""
_KEY = re.compile(r"(?P<indent> *(?:- )?)(?P<key>[A-Za-z_]\w*):(?: |$)")


def annotate(text: str, *, model: type[BaseModel] = RunConfig) -> str:
    """Return a run file in block style with each field's meaning above the first line that sets it."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(MARK)]
    path: list[tuple[int, type[BaseModel] | None]] = [(-1, model)]
    result: list[str] = []
    told: set[tuple[str, str]] = set()
    for line in lines:
        if match := _KEY.match(line):
            column = len(match["indent"])
            while path[-1][0] >= column:
                path.pop()
            owner = path[-1][1]
            field = None if owner is None else owner.model_fields.get(match["key"])
            meaning = (match["key"], "" if field is None else field.description or "")
            if field is not None and meaning not in told:
                told.add(meaning)
                result += _comment(field, indent=len(match["indent"].partition("-")[0]))
            path.append((column, None if field is None else inner_model(field.annotation)))
        result.append(line)
    return "\n".join(result) + "\n"


def all_fields(model: type[BaseModel] = RunConfig) -> str:
    """Return a run file with every field at its default; what is absent by default is commented out."""
    return "\n".join(_lines(model, indent=0)) + "\n"


def _lines(model: type[BaseModel], *, indent: int) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield from _comment(field, indent=indent)
        inner, margin = inner_model(field.annotation), " " * indent
        if inner is None:
            yield f"{margin}{name}: {_value(name, field)}"
        elif is_list(field.annotation):
            entry = list(_lines(inner, indent=indent + 4))
            first = next(place for place, line in enumerate(entry) if not line.lstrip().startswith("#"))
            comments, rest = entry[:first], entry[first:]
            yield f"{margin}{name}:"
            yield from (line[2:] for line in comments)
            yield f"{margin}  - {rest[0].lstrip()}"
            yield from rest[1:]
        else:
            lines = [f"{margin}{name}:", *_lines(inner, indent=indent + 2)]
            yield from (_commented_out(lines, indent=indent) if field.default is None else lines)


def _commented_out(lines: Sequence[str], *, indent: int) -> list[str]:
    margin = " " * indent
    return [line if line.lstrip().startswith("#") else f"{margin}# {line[indent:]}" for line in lines]


def _comment(field: FieldInfo, *, indent: int) -> list[str]:
    margin = f"{' ' * indent}{MARK} "
    text = " ".join((field.description or "").split())
    return textwrap.wrap(text, WIDTH, initial_indent=margin, subsequent_indent=margin, break_long_words=False)


def _value(name: str, field: FieldInfo) -> str:
    if field.is_required():
        return REQUIRED[name]
    value: Any = field.get_default(call_default_factory=True)
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")


def main(files: Sequence[str]) -> None:
    """Write the comments of run files anew."""
    for file in map(Path, files):
        file.write_text(annotate(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
