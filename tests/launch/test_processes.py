import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launch import pipeline
from launch.pipeline import TrainingFailed, run_pipeline, timed
from launch.processes import FATE_SHARED, process_rank, run_process, trainer_environment, under_launcher
from launch.run_config import RunConfig
from teacher_cache.answers_config import AnswersConfig
from teacher_cache.errors import CacheIncomplete, ConfigError


def test_exit_codes_pass_through() -> None:
    assert run_process([sys.executable, "-c", "import sys; sys.exit(4)"], environment=os.environ) == 4


def test_a_process_ended_by_a_signal_reports_it() -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run_process([sys.executable, "-c", code], environment=os.environ) == 128 + signal.SIGKILL


def test_a_signal_that_comes_before_the_process_is_there_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen

    def start_late(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return start(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", start_late)
    with pytest.raises(SystemExit) as caught:
        run_process([sys.executable, "-c", "import time; time.sleep(600)"], environment=os.environ)
    assert caught.value.code == 128 + signal.SIGTERM


def test_sigterm_is_passed_on_and_reported(tmp_path: Path) -> None:
    ready, ended = tmp_path / "ready", tmp_path / "ended"
    code = (
        "import pathlib, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(ended)!r}).touch(), sys.exit(0)))\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(600)\n"
    )

    def terminate_when_ready() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate_when_ready).start()
    with pytest.raises(SystemExit) as caught:
        run_process([sys.executable, "-c", code], environment=os.environ)
    assert caught.value.code == 128 + signal.SIGTERM
    assert ended.exists()


def test_a_process_ends_where_its_parent_is_gone_already_but_not_below_one_that_is_alive() -> None:
    alive = [sys.executable, "-c", "from launch.processes import end_with_parent; end_with_parent()"]
    below = [sys.executable, "-c", f"import subprocess, sys; sys.exit(subprocess.run({alive!r}).returncode)"]
    ended = subprocess.Popen(["true"])  # not waited for: its place in the table of processes is still taken
    while Path(f"/proc/{ended.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    gone = os.environ | {FATE_SHARED: str(ended.pid)}
    assert run_process(alive, environment=trainer_environment(num_processes=1)) == 0
    assert run_process(below, environment=trainer_environment(num_processes=1)) == 0
    assert run_process(alive, environment=gone) == 128 + signal.SIGKILL
    ended.wait()
    assert run_process(alive, environment=gone) == 128 + signal.SIGKILL


def test_cores_are_shared_out_and_own_settings_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert trainer_environment(num_processes=3)["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert trainer_environment(num_processes=3)["OMP_NUM_THREADS"] == "5"


def test_a_partial_launch_environment_counts_as_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert not under_launcher()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert under_launcher()


def test_srun_counts_as_a_launcher_and_gives_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # a batch script's own shell: nothing is launched yet
    assert (under_launcher(), process_rank()) == (False, 0)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert (under_launcher(), process_rank()) == (True, 3)


def test_run_files_of_different_caches_do_not_run_together(tmp_path: Path) -> None:
    def run_file(cache: str) -> RunConfig:
        values = {"uri": cache, "teacher": {"model": "t"}, "data": {"path": "d.parquet"}}
        students = [{"name": "s", "model": "m"}]
        return RunConfig.model_validate({"output_dir": str(tmp_path), "cache": values, "students": students})

    with pytest.raises(ConfigError, match="same `output_dir`, `cache` and `answers`"):
        run_pipeline(run_file("a"), run_file("b"))


def test_answers_are_written_before_the_cache_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    def build(config: RunConfig) -> bool:
        steps.append(f"build from {config.cache.data.path}")
        raise CacheIncomplete("as far as this test goes")

    def write_answers(config: RunConfig, answers: AnswersConfig) -> bool:
        steps.append(f"answers from {answers.source}")
        return True

    monkeypatch.setattr(pipeline, "build", build)
    monkeypatch.setattr(pipeline, "write_answers", write_answers)
    cache = {"uri": "c", "teacher": {"model": "t"}, "data": {"path": "new.parquet"}}
    values = {"output_dir": str(tmp_path), "cache": cache, "students": [{"name": "s", "model": "m"}]}
    for answers in (None, {"source": "old.parquet"}):
        with pytest.raises(CacheIncomplete):
            run_pipeline(RunConfig.model_validate(values | {"answers": answers}))
    assert steps == ["build from new.parquet", "answers from old.parquet", "build from new.parquet"]


def test_a_student_that_fails_does_not_keep_the_others_from_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes = {"first": 4, "second": 0, "third": 3, "fourth": 128 + signal.SIGKILL}
    steps: list[str] = []

    def train_in_a_process(command: Sequence[str], **_: object) -> int:
        steps.append(command[-1])
        (tmp_path / "training" / command[-1]).mkdir(parents=True, exist_ok=True)
        return outcomes[command[-1]]

    monkeypatch.setattr(pipeline, "build", lambda _: False)
    monkeypatch.setattr(pipeline, "_training_key", lambda *_: "key")
    monkeypatch.setattr(pipeline, "run_process", train_in_a_process)
    monkeypatch.setattr(pipeline, "evaluate", lambda _: steps.append("evaluate") or True)
    monkeypatch.setattr(pipeline, "report", lambda _: steps.append("report") or True)
    monkeypatch.setattr(pipeline, "account", lambda _: steps.append("account"))
    values: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "cache": {"uri": "c", "teacher": {"model": "t"}, "data": {"path": "d.parquet"}},
        "students": [{"name": name, "model": "m"} for name in outcomes],
        "evaluation": {"data": "held-out.parquet"},
    }
    with pytest.raises(TrainingFailed) as caught:
        run_pipeline(RunConfig.model_validate(values))
    assert steps == [*outcomes, "evaluate", "report", "account"]
    assert caught.value.exit_code == 3, "running again gets the third further"
    assert "first failed with exit code 4" in str(caught.value)
    assert "fourth was ended by SIGKILL (out of memory?)" in str(caught.value)
    assert "second" not in str(caught.value)
    assert (tmp_path / "training" / "second" / "COMPLETE").read_text() == "key"
    assert not (tmp_path / "training" / "first" / "COMPLETE").exists()

    outcomes |= {"second": 0, "third": 0, "fourth": 0}
    with pytest.raises(TrainingFailed, match="first failed with exit code 4") as caught:
        run_pipeline(RunConfig.model_validate(values))
    assert caught.value.exit_code == 4, "running again is useless"


def test_timings_add_up_over_runs_and_survive_a_failure(tmp_path: Path) -> None:
    import json

    with timed(tmp_path, step="a"):
        time.sleep(0.11)
    with pytest.raises(RuntimeError, match="boom"), timed(tmp_path, step="b"):
        raise RuntimeError("boom")
    with timed(tmp_path, step="a"):
        time.sleep(0.11)
    timings = {timing["step"]: timing["seconds"] for timing in json.loads((tmp_path / "timings.json").read_text())}
    assert timings["a"] >= 0.2
    assert set(timings) == {"a", "b"}
