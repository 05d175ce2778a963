"""What docs/clusters.md says is run, as far as no cluster is needed for it."""

import contextlib
import importlib
import io
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from launch.cli import COMMANDS, main, split_command
from launch.run_config import RunConfig, load_run_config
from tests.launch.test_readme import blocks

TEXT = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text()
LINES = [line for block in blocks("console", text=TEXT) for line in block.splitlines()]
RUN_FILES = dict(zip(("slurm", "ray", "kuberay"), blocks("yaml", text=TEXT), strict=True))


def scheduler_of(line: str) -> str:
    return next((name for name in RUN_FILES if f"submit {name}" in line), "slurm")


@pytest.mark.parametrize("line", LINES)
def test_commands_run(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that only show something run; those that submit are parsed and planned."""
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUN_FILES[scheduler_of(line)])
    words = shlex.split(line)
    assert words[0] == "genrecal"
    if words[1] == "submit" and "--plan" not in words:
        name, arguments = split_command(words[1:])
        module, function = COMMANDS[str(name)].target.split(":")
        parser = getattr(importlib.import_module(module), f"{function.removesuffix('_command')}_parser")()
        options, overrides = parser.parse_known_args(arguments)
        load_run_config(options.config, overrides)
        words.append("--plan")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(words[1:]) == 0
    if "--plan" in words:
        kind = words[words.index("--only") + 1] if "--only" in words else "cache"
        assert f"genrecal-{kind}-" in printed.getvalue()
        assert not Path("runs/mine/submit").exists()


@pytest.mark.parametrize("name", RUN_FILES)
def test_run_files_hold_the_section_that_they_show(name: str) -> None:
    values = yaml.safe_load(RUN_FILES[name])
    assert set(values["cluster"]) == {name}
    RunConfig.model_validate(values)


def test_the_token_file_is_private(tmp_path: Path) -> None:
    (block,) = blocks("bash", text=TEXT)
    script = f"{block}stat --format=%a ray-token; wc --bytes <ray-token; echo $RAY_AUTH_MODE"
    done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["600", "65", "token"]


def test_named_fields_exist() -> None:
    schema = str(RunConfig.model_json_schema())
    for name in set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", TEXT)) - {"output_dir"}:
        assert f"'{name}'" in schema, name


def test_jobs_without_any_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs", str(tmp_path)]) == 0
    assert "no jobs were submitted" in capsys.readouterr().out
