"""docs/errors.md names every error code with its exit code, once, and no other."""

import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import distill
import launch
import teacher_cache
from teacher_cache.errors import GenrecalError

PAGE = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
ROW = re.compile(r"^\| `([a-z-]+)` \| (\d) \| (.+) \| (.+) \| (.+) \|$", re.MULTILINE)
DEFINES_ERRORS = re.compile(r"^class \w+\(.*(?:Error|CacheIncomplete|CacheMismatch|DataMismatch)\b.*\):", re.MULTILINE)


def error_classes(base: type[GenrecalError] = GenrecalError) -> Iterator[type[GenrecalError]]:
    yield base
    for kind in base.__subclasses__():
        yield from error_classes(kind)


def test_every_code_is_explained_with_its_exit_code() -> None:
    for package in (teacher_cache, distill, launch):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            source = Path(package.__path__[0]).parent / f"{module.name.replace('.', '/')}.py"
            if source.exists() and DEFINES_ERRORS.search(source.read_text()):
                importlib.import_module(module.name)
    defined = {(kind.code, kind.exit_code) for kind in error_classes() if kind.__module__.partition(".")[0] != "tests"}
    rows = ROW.findall(PAGE)
    assert {(code, int(exit_code)) for code, exit_code, *_ in rows} == defined
    assert len({code for code, *_ in rows}) == len(rows)
    assert all(len(text.split()) > 2 for _, _, *texts in rows for text in texts)
