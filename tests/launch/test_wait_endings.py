"""How jobs on Kubernetes learn that a job before them has ended for good, and how that job stays ended."""

import os
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from launch.clusters import node_ranks, ray_driver, wait
from launch.clusters.endings import endings, leave_ending
from launch.clusters.jobs import run_jobs
from launch.run_config import RunConfig
from tests.launch.test_submit_slurm import VALUES

RUN_FILE = "run.yaml"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray_driver, "CLUSTER_ENDS_S", 0.0)
    Path(RUN_FILE).write_text(yaml.safe_dump(VALUES))
    return RunConfig.model_validate(VALUES)


def moment(seconds: float = 0.0) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def drive(monkeypatch: pytest.MonkeyPatch, *codes: int, since: datetime) -> tuple[int, int]:
    """Run the driver of the cache job; return its exit code, and how many steps it started."""
    left = list(codes)
    monkeypatch.setattr(ray_driver, "_genrecal", lambda command: left.pop(0))
    arguments = ["cache", RUN_FILE, "--attempts", "3", "--since", since.isoformat()]
    return ray_driver.main(arguments), len(codes) - len(left)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((2,), 2), ((0, 4), 4), ((1,), 1), ((3, 3, 3), 3)],
    ids=["config", "mismatch", "own", "spent"],
)
def test_a_cache_job_that_has_ended_ends_at_once_when_it_is_started_again(
    codes: tuple[int, ...], expected: int, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted = moment(-1)
    assert drive(monkeypatch, *codes, since=submitted) == (expected, len(codes))
    assert endings(config, since=submitted) == {"cache": expected}
    assert drive(monkeypatch, 0, 0, since=submitted) == (expected, 0)
    assert drive(monkeypatch, 0, 0, since=moment(1)) == (0, 2), "a new submission does not start"


def test_a_cache_job_that_succeeded_or_was_lost_leaves_no_ending(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted = moment(-1)
    assert drive(monkeypatch, 3, 0, 0, since=submitted) == (0, 3)
    monkeypatch.setattr(ray_driver, "CLUSTER_ENDS_S", 60.0)

    def lost(seconds: float) -> None:
        raise SystemExit(143)

    monkeypatch.setattr(ray_driver.time, "sleep", lost)
    with pytest.raises(SystemExit):
        drive(monkeypatch, 1, since=submitted)
    assert endings(config, since=submitted) == {}


def test_jobs_submitted_later_learn_of_an_ending_that_was_found_again(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted = moment(-1)
    drive(monkeypatch, 2, since=submitted)
    later = moment()
    assert endings(config, since=later) == {}
    drive(monkeypatch, since=submitted)
    assert endings(config, since=later) == {"cache": 2}


def wait_for_cache(since: datetime) -> int:
    return wait.main([RUN_FILE, "--job", "cache", "--limit-s", "0", "--since", since.isoformat()])


def test_waiting_ends_where_the_cache_was_refused(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert wait_for_cache(moment(-1)) == 3
    leave_ending(RUN_FILE, "cache", exit_code=4)
    assert wait_for_cache(moment(-10)) == 4
    assert "error [jobs-ended]: cache of run.yaml will not become complete: it has ended with exit code 4" in (
        capsys.readouterr().err
    )
    assert wait_for_cache(moment(10)) == 3, "of an earlier submission"


@pytest.mark.parametrize(("code", "left"), [(2, True), (4, True), (1, False), (143, False), (0, False)])
def test_a_refused_training_tells_the_report(
    code: int, left: bool, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_ranks, "run_ranks", lambda *_, **__: code)
    place = ["--log-dir", "logs", "--nodes", "1", "--node", "0", "--processes-per-node", "1", "--master", "first:1"]
    assert node_ranks.main([RUN_FILE, "--student", "qwen2-vl", *place]) == code
    assert endings(config, since=moment(-10)) == ({"train qwen2-vl": code} if left else {})


def test_what_is_no_ending_is_none(config: RunConfig) -> None:
    folder = Path("run/submit/marks")
    folder.mkdir(parents=True)
    for job, text in zip(run_jobs(config), ("", "[]", '{"ended": "now", "exit_code": 2}', "\xff"), strict=True):
        (folder / f"{job.name}.ended").write_bytes(text.encode("latin-1"))
    assert endings(config, since=moment(-10)) == {}


def test_an_ending_that_cannot_be_written_hides_no_exit_code(
    config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    Path("run").write_text("a file")
    leave_ending(RUN_FILE, "cache", exit_code=2)
    leave_ending("none.yaml", "cache", exit_code=2)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2


def catches(number: signal.Signals, *, pid: int) -> bool:
    (mask,) = re.findall(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_a_container_that_waits_ends_when_it_is_told_to(config: RunConfig) -> None:
    """As the first process of its container it gets no signal that it does not catch."""
    arguments = [RUN_FILE, "--job", "cache", "--limit-s", "60", "--since", moment().isoformat()]
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.clusters.wait", *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    while not catches(signal.SIGTERM, pid=process.pid):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=30) == 143
