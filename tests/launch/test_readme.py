"""What the README says is run: its commands, its Python, its run file, its list of files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.cli import COMMANDS
from launch.run_config import RunConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for tag, text in fenced if tag == language]


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


def test_every_command_and_source_file_is_named() -> None:
    for command in COMMANDS:
        group, _, name = command.partition(" ")
        assert f"genrecal {group}" in README
        assert name in README
    tree = next(block for block in blocks("text") if "teacher_cache/" in block)
    for package in ("teacher_cache", "recalibrator", "distill", "launch"):
        for path in (ROOT / package).rglob("*.py"):
            assert path.name in tree or path.name == "__init__.py", path
