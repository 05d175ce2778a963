"""The page about the paper names functions and fields that exist, and every ambiguity."""

import importlib
import re
from pathlib import Path
from typing import get_args

from pydantic import BaseModel

from distill.config import Method, StudentConfig
from launch.run_config import RunConfig

PAPER = (Path(__file__).parents[2] / "docs" / "paper.md").read_text()
NAMES = re.findall(r"`((?:teacher_cache|recalibrator|distill)\.[\w.]+)`", PAPER)
FIELDS = re.findall(r"`((?:train|students|cache)\.[\w.]+)`", PAPER)


def resolve(name: str) -> object:
    package, module, *attributes = name.split(".")
    found: object = importlib.import_module(f"{package}.{module}")
    for attribute in attributes:
        found = getattr(found, attribute)
    return found


def has_field(model: type[BaseModel], path: list[str]) -> bool:
    if path[0] not in model.model_fields:
        return False
    inner = model.model_fields[path[0]].annotation
    return len(path) == 1 or (isinstance(inner, type) and issubclass(inner, BaseModel) and has_field(inner, path[1:]))


def test_every_function_exists() -> None:
    assert len(set(NAMES)) > 20
    for name in NAMES:
        assert resolve(name) is not None


def test_every_field_exists() -> None:
    assert len(set(FIELDS)) > 30
    for name in FIELDS:
        first, *rest = name.split(".")
        assert has_field(StudentConfig, rest) if first == "students" else has_field(RunConfig, [first, *rest]), name


def test_every_ambiguity_and_method_has_its_place() -> None:
    assert re.findall(r"^\| (A\d+) \|", PAPER, flags=re.MULTILINE) == [f"A{number}" for number in range(1, 14)]
    assert set(re.findall(r"method `(\w+)`", PAPER)) == {*get_args(Method)} - {"genrecal"}
