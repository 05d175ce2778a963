"""The installer of lmms-eval's environment, with stand-ins for pip and lmms-eval: what it makes, and makes again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.suites.environment import INDEX, INSTALLER, open_environment
from teacher_cache.errors import ConfigError

PIP = """import os, sys
with open(os.environ["PIP_CALLS"], "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
"""
TASKS = """class TaskManager:
    def __init__(self, *words, **options):
        inner = {"group": "inner", "task": ["one", {"task": "two", "num_fewshot": 1}]}
        self.task_index = {name: {"type": "task", "yaml_path": name} for name in ("one", "two", "three")}
        self.task_index["all"] = {"type": "group", "task": [inner, "three"], "yaml_path": "all"}
        self.task_index["lost"] = {"type": "group", "task": ["four"], "yaml_path": "lost"}
        self.all_tasks = list(self.task_index)
"""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Modules that come before those of every environment."""
    folder = tmp_path / "packages"
    metadata = folder / "lmms_eval-0.7.3.dist-info" / "METADATA"
    for path, text in {
        folder / "pip.py": PIP,
        folder / "lmms_eval" / "__init__.py": "",
        folder / "lmms_eval" / "models.py": "def list_available_models():\n    return ['genrecal']\n",
        folder / "lmms_eval" / "tasks.py": TASKS,
        folder / "lmms_eval" / "utils.py": "def load_yaml_config(path, mode):\n    return {}\n",
        metadata: "Metadata-Version: 2.1\nName: lmms-eval\nVersion: 0.7.3\n",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def install(venv: Path, *, packages: Path, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(packages), "PIP_CALLS": str(packages / "calls")}
    command = [str(INSTALLER), str(venv), sys.executable]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)


def pip_calls(packages: Path) -> list[str]:
    path = packages / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_an_environment_is_made_once_and_again_where_it_is_not_whole(packages: Path, tmp_path: Path) -> None:
    venv = tmp_path / "a folder" / "venv"
    made = install(venv, packages=packages)
    assert made.returncode == 0, made.stderr
    assert open_environment(venv).version == "0.7.3"
    (call,) = pip_calls(packages)
    assert call.endswith(f"-c {INSTALLER.with_name('constraints.txt')} lmms-eval")

    again = install(venv, packages=packages)
    assert (again.returncode, again.stdout, len(pip_calls(packages))) == (0, "", 1)

    (venv / INDEX).write_text("{")
    assert install(venv, packages=packages).returncode == 0
    assert open_environment(venv).version == "0.7.3"
    (venv / "bin" / "python").unlink()
    assert install(venv, packages=packages).returncode == 0
    assert open_environment(venv).version == "0.7.3"
    assert len(pip_calls(packages)) == 3


def test_a_folder_named_launch_where_the_user_stands_is_not_the_package(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    (here / "launch").mkdir(parents=True)
    (here / "launch" / "__init__.py").write_text("raise RuntimeError('another package')")
    made = install(tmp_path / "venv", packages=packages, cwd=here)
    assert made.returncode == 0, made.stderr
    monkeypatch.chdir(here)
    monkeypatch.setenv("PYTHONPATH", str(packages))
    assert "three" in open_environment(tmp_path / "venv", include=tmp_path).tasks


def test_groups_within_groups_are_known_by_their_tasks(packages: Path, tmp_path: Path) -> None:
    assert install(tmp_path / "venv", packages=packages).returncode == 0
    environment = open_environment(tmp_path / "venv")
    assert environment.suite("all").parts == ("one", "three", "two")
    with pytest.raises(ConfigError, match="does not have"):
        environment.suite("lost")


def test_an_environment_without_the_model_is_not_taken_for_whole(packages: Path, tmp_path: Path) -> None:
    models = packages / "lmms_eval" / "models.py"
    known = models.read_text()
    models.write_text(known.replace("genrecal", "other_model"))
    made = install(tmp_path / "venv", packages=packages)
    assert made.returncode == 1
    assert "install genrecal anew" in made.stderr
    models.write_text(known)
    assert install(tmp_path / "venv", packages=packages).returncode == 0


@pytest.mark.parametrize("file", ["precious.txt", "pyvenv.cfg"])
def test_a_folder_with_something_else_is_left_alone(file: str, packages: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / file).write_text("kept")
    refused = install(folder, packages=packages)
    assert refused.returncode == 1
    assert "name another folder" in refused.stderr
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(file, "kept")]
