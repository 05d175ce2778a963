"""What README, operations and files say is held to the code: commands, Python, run files, fields, the files."""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from launch.cli import COMMANDS, split_command
from launch.run_config import RunConfig, load_run_config
from teacher_cache.config import CacheConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FILES = (ROOT / "docs" / "files.md").read_text()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()


def blocks(language: str, *, text: str = README) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for tag, content in fenced if tag == language]


def console_lines() -> list[str]:
    return [line for block in blocks("console", text=OPERATIONS) for line in block.splitlines()]


def module_lines() -> list[str]:
    """The lines of the tree in docs/files.md that are about one module."""
    (tree,) = blocks("text", text=FILES)
    return [line.strip() for line in tree.splitlines() if re.match(r"\s+\w+\.py\s", line)]


def first_line(module: Path) -> str:
    return (ast.get_docstring(ast.parse(module.read_text())) or "").partition("\n")[0].removesuffix(".")


@pytest.fixture
def beside_the_demo(demo: Path, tmp_path: Path) -> Path:
    """A working directory in which runs/demo is the demo that ran."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(demo)
    return tmp_path


def test_commands_run(beside_the_demo: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for line in "".join(blocks("bash")).splitlines():
        done = subprocess.run(
            line, shell=True, cwd=beside_the_demo, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"


def test_python_runs(beside_the_demo: Path) -> None:
    for block in blocks("python"):
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=beside_the_demo, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_run_files_are_valid() -> None:
    for block in blocks("yaml"):
        RunConfig.model_validate(yaml.safe_load(block))


def test_only_make_commands_stand_outside_of_what_is_run() -> None:
    assert {line for block in blocks("") for line in block.splitlines()} == {"make demo", "make test"}


def test_every_command_is_named() -> None:
    for command in COMMANDS:
        group, _, name = command.partition(" ")
        assert f"genrecal {group}" in README
        assert name in README


def test_every_source_file_is_named_with_what_it_says_of_itself() -> None:
    lines = {" ".join(line.split()) for line in module_lines()}
    for package in ("teacher_cache", "recalibrator", "distill", "launch", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            assert f"{path.name} {first_line(path)}" in lines or path.name == "__init__.py", path


def test_every_named_file_exists() -> None:
    folders = ("teacher_cache", "recalibrator", "distill", "launch", "benchmarks", "tests/reliability")
    known = {f"{path.name} {first_line(path)}" for folder in folders for path in (ROOT / folder).rglob("*.py")}
    assert {" ".join(line.split()) for line in module_lines()} <= known


def test_the_readme_has_the_folders_of_the_list_of_files() -> None:
    (tree,) = blocks("text", text=FILES)
    folders = next(block for block in blocks("text") if "teacher_cache/" in block)
    assert folders.splitlines() == [line for line in tree.splitlines() if not line.startswith(" ")]


def test_pages_that_the_commands_name_exist() -> None:
    sources = [path.read_text() for path in (ROOT / "launch").rglob("*.py")]
    named = {page for source in sources for page in re.findall(r"docs/[a-z_-]+\.md", source)}
    assert "docs/data.md" in named
    assert all((ROOT / page).exists() for page in named), named


def test_the_readme_links_every_page() -> None:
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= set(re.findall(r"\]\(([^)#:]+)", README))


def all_console_lines() -> list[str]:
    """The commands in every page; lines that go on after a backslash count as one."""
    pages = [page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))]
    found = "".join(block for page in pages for block in blocks("console", text=page)).replace("\\\n", " ")
    return sorted({line.partition(" # ")[0] for line in found.splitlines() if line.startswith("genrecal ")})


@pytest.mark.parametrize("line", all_console_lines())
def test_commands_of_the_pages_parse(line: str, tmp_path: Path) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text(blocks("yaml")[0] + "answers: {source: data/original.parquet}\n")
    name, arguments = split_command(shlex.split(line)[1:])
    assert name is not None
    module, function = COMMANDS[name].target.split(":")
    parser = getattr(importlib.import_module(module), f"{function.removesuffix('_command')}_parser")()
    options, overrides = parser.parse_known_args(arguments)
    assert overrides == [] or parser.takes_run_file
    if parser.takes_run_file:
        assert options.config == run_file.name
        load_run_config(run_file, overrides)


def test_operations_need_no_other_programs_than_everywhere() -> None:
    assert {line.split()[0] for line in console_lines()} <= {"genrecal", "chmod", "export", "rsync"}


@pytest.mark.parametrize("text", [README, OPERATIONS], ids=["README", "operations"])
def test_named_fields_exist(text: str) -> None:
    named = set(re.findall(r"`((?:cache|build|data|targets|teacher|train)\.[a-z_.]+)(?:`|: )", text))
    assert len(named) > 3
    for name in named:
        assert is_field(RunConfig, name) or is_field(CacheConfig, name), name


def is_field(model: type[BaseModel], name: str) -> bool:
    first, _, rest = name.partition(".")
    if first not in model.model_fields:
        return False
    inner = model.model_fields[first].annotation
    return not rest or (isinstance(inner, type) and issubclass(inner, BaseModel) and is_field(inner, rest))


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.stem
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
