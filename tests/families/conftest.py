"""Directories of the families, each written once."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeAlias

import pytest

from tests.families.models import FAMILIES, HEADS, write_family

Directories: TypeAlias = Callable[[str], Path]


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Directories:
    """Return the model directory of a family by name."""

    @cache
    def directory(name: str) -> Path:
        path = tmp_path_factory.mktemp(name) / "model"
        write_family((FAMILIES | HEADS)[name], path)
        return path

    return directory
