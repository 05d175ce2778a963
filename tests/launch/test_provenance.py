"""Beside every output lie the run file that made it and a record of the runs that did; secrets and sockets of a run."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from distill.config import STAGES
from launch.cli import main
from launch.provenance import read_runs, record_path, recorded, run_file_path
from launch.run_config import RunConfig, load_run_config, validated
from launch.software import PACKAGES, source_state, versions
from tests.launch.canaries import ENVIRONMENT, hits

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    values = {
        "output_dir": str(tmp_path),
        "cache": {"uri": "c", "teacher": {"model": "t"}, "data": {"path": "d.parquet"}},
        "students": [{"name": "s", "model": "m"}],
    }
    return validated(values, source="test")


def test_each_run_that_did_something_is_recorded(tmp_path: Path, config: RunConfig) -> None:
    output = tmp_path / "deep" / "output"
    with pytest.raises(SystemExit), recorded(lambda: [output], config=config):
        raise SystemExit(143)
    with recorded(lambda: [output], config=config):
        pass
    before = record_path(output).read_bytes()
    with recorded(lambda: [output], config=config) as recording:
        recording.counts = False
    assert record_path(output).read_bytes() == before
    assert [run["outcome"] for run in read_runs(output)] == ["SystemExit", "done"]
    assert load_run_config(run_file_path(output)) == config
    (run,) = read_runs(output)[1:]
    assert run["argv"] == sys.argv
    assert run["started"] <= run["ended"]
    assert run["versions"] == versions()
    assert set(run["versions"]) >= {"python", "genrecal", "torch", "transformers", "zarr", "numcodecs"}
    assert run["source"] == source_state()
    assert sorted(path.name for path in output.parent.iterdir()) == ["output.provenance.json", "output.run.yaml"]


def test_a_run_that_is_killed_leaves_its_record(tmp_path: Path, config: RunConfig) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    block = recorded(lambda: [first], config=config, expected=[first, second])
    block.__enter__()  # and never left
    assert [run["outcome"] for output in (first, second) for run in read_runs(output)] == ["running", "running"]
    block.__exit__(None, None, None)
    assert [run["outcome"] for run in read_runs(first)] == ["done"]
    assert not record_path(second).exists()
    assert not run_file_path(second).exists()


def test_the_source_tree_is_named_by_its_commit() -> None:
    state = source_state()
    assert state is not None
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert state["commit"] == head.stdout.strip()
    assert len(set(PACKAGES)) == len(PACKAGES)


def outputs(run: Path) -> list[Path]:
    """Everything that a whole run makes."""
    stages = [done.parent for done in run.glob("training/*/*/DONE.json")]
    students = [path for path in (run / "students").iterdir() if path.is_dir()]
    return [run / "cache", run / "evaluation", run / "report.html", *stages, *students]


def test_every_output_of_a_run_has_its_record(demo: Path) -> None:
    found = outputs(demo)
    assert len(found) > 8
    for output in found:
        runs = read_runs(output)
        assert runs, output
        # one of the trainings was killed after a stage, and the next run found that stage done
        assert runs[-1]["outcome"] in ("done", "running"), output
        assert runs[-1]["outcome"] == "done" or output.name in STAGES
        assert all(run["versions"]["torch"] == versions()["torch"] for run in runs)
        assert load_run_config(run_file_path(output)).output_dir == str(demo)


def digests(run: Path) -> dict[Path, str]:
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in run.rglob("*")
        if path.is_file() and "logs" not in path.relative_to(run).parts
    }


def test_a_run_of_the_resolved_file_finds_all_complete_and_changes_nothing(demo: Path) -> None:
    before = digests(demo)
    run_file = next((demo / "students").glob("*.run.yaml"))
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "run", str(run_file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert digests(demo) == before


def test_nothing_of_a_run_shows_a_secret(demo: Path) -> None:
    assert hits(demo) == []
    watched = json.loads((demo.parent / "watched.json").read_text())
    assert len(watched["command_lines"]) > 5
    assert not [line for line in watched["command_lines"] for secret in ENVIRONMENT.values() if secret in line]


def test_a_run_listens_on_the_loopback_or_as_documented(demo: Path) -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    watched = json.loads((demo.parent / "watched.json").read_text())
    assert watched["listening"]
    for program, address in watched["listening"]:
        name = "ray::" if program.startswith("ray::") else program
        assert address in ("127.0.0.1", "::1") or f"| `{name}` |" in page, (program, address)


def test_a_resolved_file_shows_as_itself(tmp_path: Path, config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    with recorded(lambda: [tmp_path / "x"], config=config):
        pass
    assert main(["config", "show", str(tmp_path / "x.run.yaml")]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == config.model_dump(mode="json")
