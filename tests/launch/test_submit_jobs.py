"""What is complete, what the journal holds, and what schedulers say of jobs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.identity import run_identity
from launch.cli import main
from launch.clusters import journal, ray_nodes, report_job
from launch.clusters.jobs import cache_shape, run_jobs
from launch.clusters.journal import Submission
from launch.clusters.listing import list_jobs
from launch.clusters.marks import cache_complete, mark_report, report_complete, student_complete
from launch.clusters.programs import run_program
from launch.clusters.slurm_submit import submit_slurm
from launch.clusters.states import scheduler_states
from launch.clusters.submission import frozen_run_file, write_frozen_run_file
from launch.run_config import RunConfig
from teacher_cache.documents import encode_document
from teacher_cache.errors import ConfigError, GenrecalError
from tests.launch.test_submit_slurm import VALUES


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.chdir(tmp_path)
    return RunConfig.model_validate(VALUES | {"train": {"num_processes": 1}})


def finish(config: RunConfig, name: str, **changes: Any) -> None:
    """Leave what a finished training leaves."""
    student = config.student(name).alone()
    for stage in config.train.stages:
        identity = run_identity(
            student, config.train, stage=stage, cache="fingerprint", samples="", initial_weights="", student_files=""
        )
        folder = Path(config.output_dir) / "training" / name / stage
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "DONE.json").write_bytes(encode_document({"identity": identity | changes}))
    published = Path(config.output_dir) / "students" / name
    published.mkdir(parents=True, exist_ok=True)
    (published / "config.json").write_text("{}")


def test_a_student_is_complete_with_all_stages_and_its_own_settings(config: RunConfig) -> None:
    assert not student_complete(config, "internvl")
    finish(config, "internvl")
    assert student_complete(config, "internvl")
    assert not student_complete(config, "qwen2-vl")
    finish(config, "internvl", seed=1)
    assert not student_complete(config, "internvl")
    finish(config, "internvl")
    done = Path(config.output_dir) / "training" / "internvl" / "distill" / "DONE.json"
    whole = done.read_bytes()
    done.write_bytes(whole.replace(b"fingerprint", b"fingerprinx"))
    assert not student_complete(config, "internvl"), "a damaged mark counts"
    done.unlink()
    assert not student_complete(config, "internvl")


def test_nothing_is_complete_without_a_cache(config: RunConfig) -> None:
    for student in config.students:
        finish(config, student.name)
    assert not cache_complete(config)
    assert [job.complete for job in run_jobs(config)] == [False] * 4


def test_a_report_is_complete_while_it_is_newer_than_the_students(config: RunConfig) -> None:
    output_dir = Path(config.output_dir)
    for student in config.students:
        finish(config, student.name)
    assert not report_complete(config)
    for name in ("results.json", "report.html"):
        (output_dir / name).write_text("")
    mark_report(config)
    assert report_complete(config)
    os.utime(output_dir / "report.html", (1, 1))
    assert not report_complete(config)


def test_a_report_is_complete_for_its_own_evaluation_alone(config: RunConfig) -> None:
    output_dir = Path(config.output_dir)
    for student in config.students:
        finish(config, student.name)
    for name in ("results.json", "report.html"):
        (output_dir / name).write_text("")
    assert config.evaluation is not None
    fewer = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"max_samples": 3})})
    mark_report(config)
    assert (report_complete(config), report_complete(fewer)) == (True, False)
    mark_report(fewer)
    assert (report_complete(config), report_complete(fewer)) == (False, True)


@pytest.mark.parametrize("failing", ["eval", "report", None])
def test_a_report_job_marks_what_it_has_done(
    failing: str | None, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_frozen_run_file(config)
    called: list[str] = []

    def genrecal(argv: list[str]) -> int:
        called.append(argv[0])
        return 3 if argv[0] == failing else 0

    monkeypatch.setattr(report_job.cli, "main", genrecal)
    assert report_job.main([str(frozen_run_file(config))]) == (0 if failing is None else 3)
    assert called == (["eval"] if failing == "eval" else ["eval", "report"])
    assert (Path(config.output_dir) / "submit" / "marks" / "report").exists() is (failing is None)


def test_nodes_follow_from_the_replicas(config: RunConfig) -> None:
    resources = config.cluster.slurm.cache

    def shape(**changes: int) -> tuple[int, int]:
        found = cache_shape(config, resources.model_copy(update=changes))
        return found.nodes, found.gpus_per_node

    assert shape() == (2, 8)
    assert shape(gpus_per_node=6) == (4, 4), "a replica lies on one node"
    with pytest.raises(ConfigError, match=r"a replica of the teacher takes 4 GPUs .* a node has 3: lower these"):
        shape(gpus_per_node=3)
    assert shape(gpus_per_node=0) == (1, 0)
    assert shape(nodes=5) == (5, 4)
    assert shape(nodes=1) == (1, 8), "no more than a node has"


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        ({"num_replicas": 1}, (1, 1)),
        ({"num_replicas": 3, "tensor_parallel_size": 2}, (1, 6)),
        ({"num_replicas": 9}, (2, 5)),
        ({"num_replicas": 2, "gpus_per_replica": 0.5}, (1, 1)),
        ({"num_replicas": 17, "gpus_per_replica": 0.5}, (2, 5)),
        ({"num_replicas": 2, "gpus_per_replica": 0}, (1, 0)),
    ],
)
def test_no_gpu_is_asked_for_that_no_replica_uses(build: dict[str, float], expected: tuple[int, int]) -> None:
    config = RunConfig.model_validate(VALUES | {"cache": VALUES["cache"] | {"build": build}})
    found = cache_shape(config, config.cluster.slurm.cache)
    assert (found.nodes, found.gpus_per_node) == expected


def submission(**changes: Any) -> Submission:
    values = {"scheduler": "slurm", "label": "cache", "key": "k", "job_id": "1", "run_file": "x", "submitted": "t"}
    return Submission(**(values | changes))


def test_the_journal_keeps_order_and_survives_a_cut_line(tmp_path: Path) -> None:
    for number in ("1", "2"):
        journal.append(tmp_path, submission(job_id=number))
    with (tmp_path / journal.JOURNAL).open("a") as file:
        file.write('{"scheduler": "slu')
    assert [entry.job_id for entry in journal.read(tmp_path)] == ["1", "2"]
    newest = journal.latest(tmp_path, scheduler="slurm", key="k")
    assert newest is not None
    assert newest.job_id == "2"
    assert journal.latest(tmp_path, scheduler="ray", key="k") is None
    assert (tmp_path / journal.JOURNAL).stat().st_mode & 0o077 == 0


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return tmp_path / "bin"


def test_the_queue_is_right_where_the_accounting_lags(programs: Path) -> None:
    program(programs, "sacct", "printf '1|RUNNING\\n2_0|CANCELLED by 0\\n'")
    program(programs, "squeue", "printf '1|COMPLETED\\n'")
    entries = [submission(job_id="1"), submission(job_id="2_0"), submission(job_id="9")]
    assert scheduler_states(entries) == {"1": "COMPLETED", "2_0": "CANCELLED"}
    program(programs, "sacct", "exit 1")
    assert scheduler_states(entries) == {"1": "COMPLETED"}


def test_a_scheduler_that_cannot_be_asked_says_nothing(programs: Path) -> None:
    program(programs, "sacct", "exit 1")
    program(programs, "squeue", "exit 1")
    program(programs, "kubectl", "exit 1")
    ray = submission(scheduler="ray", where={"address": "http://127.0.0.1:1"})
    assert scheduler_states([submission(), ray, submission(scheduler="kuberay")]) == {}


def test_faults_of_programs_are_named(programs: Path) -> None:
    with pytest.raises(ConfigError, match="no program 'genrecal-none' on PATH"):
        run_program(["genrecal-none"])
    program(programs, "broken", "echo no such partition >&2; exit 5")
    with pytest.raises(GenrecalError, match="broken failed with exit code 5: no such partition"):
        run_program(["broken"])


def test_jobs_are_listed_with_their_marks(config: RunConfig, programs: Path, tmp_path: Path) -> None:
    program(programs, "sacct", "exit 1")
    program(programs, "squeue", "printf '7|FAILED\\n'")
    write_frozen_run_file(config)
    cache = run_jobs(config)[0]
    entry = submission(key=cache.key, run_file=str(frozen_run_file(config)))
    folder = tmp_path / "run" / "submit"
    journal.append(folder, entry)
    journal.append(folder, submission(key=cache.key, run_file=entry.run_file, job_id="7"))
    journal.append(folder, submission(key="other", run_file="gone.yaml"))
    for place in (tmp_path, tmp_path / "run"):
        listed = [(item.submission.job_id, item.state, item.complete) for item in list_jobs(place)]
        assert listed == [("7", "FAILED", False), ("1", "unknown", None)]


@pytest.mark.parametrize("name", ["nope", "run.yaml"])
def test_jobs_of_what_is_no_folder_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("output_dir: run\n")
    assert main(["jobs", name]) == 2
    assert f"{name} is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("scheduler", ["slurm", "ray", "kuberay"])
def test_a_misspelt_option_of_submit_gets_a_suggestion(
    scheduler: str, config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    write_frozen_run_file(config)
    assert main(["submit", scheduler, str(frozen_run_file(config)), "--pln"]) == 2
    assert "did you mean '--plan'" in capsys.readouterr().err


def test_an_answer_of_sbatch_that_is_no_number_is_an_error(config: RunConfig, programs: Path) -> None:
    program(programs, "sbatch", "echo queued")
    with pytest.raises(GenrecalError, match="sbatch answered 'queued'"):
        submit_slurm(config)
    assert journal.read(Path("run/submit")) == []


def test_each_job_depends_on_the_one_before(config: RunConfig, programs: Path) -> None:
    program(programs, "sbatch", 'echo "$*" >>calls; echo "$(wc --lines <calls);cluster"')
    states = {outcome.job.label: outcome.job_id for outcome in submit_slurm(config)}
    assert states == {"cache": "1", "train internvl": "2_0", "train qwen2-vl": "2_1", "report": "3"}
    dependencies = [line.split("--dependency=")[-1].split()[0] for line in Path("calls").read_text().splitlines()]
    assert dependencies[1:] == ["afterok:1", "afterok:2"]


QUEUES = [
    # what the queue says -> what becomes of cache, internvl, qwen2-vl and report, and what the new ones wait for
    ({"1": "RUNNING", "2_0": "PENDING", "2_1": "PENDING", "3": "PENDING"}, ["", "", "", ""], []),
    ({"1": "COMPLETED", "2_0": "RUNNING", "2_1": "FAILED", "3": "CANCELLED"}, ["4", "", "5_0", "6"], ["4", "2_0:5"]),
    ({"1": "RUNNING", "2_0": "RUNNING", "2_1": "FAILED", "3": "PENDING"}, ["", "", "4_0", "5"], ["1", "2_0:4"]),
    ({"1": "RUNNING"}, ["", "4_0", "4_1", "5"], ["1", "4"]),
]


@pytest.mark.parametrize(("queue", "submitted", "waits_for"), QUEUES)
def test_only_what_neither_waits_nor_runs_is_submitted_again(
    queue: dict[str, str], submitted: list[str], waits_for: list[str], config: RunConfig, programs: Path
) -> None:
    program(programs, "sbatch", 'echo "$*" >>calls; wc --lines <calls')
    program(programs, "sacct", "exit 1")
    program(programs, "squeue", "exit 1")
    first = submit_slurm(config)
    program(programs, "squeue", "".join(f"echo '{job_id}|{state}'\n" for job_id, state in queue.items()))
    second = submit_slurm(config)
    assert [one.job_id for one in second] == [new or old.job_id for new, old in zip(submitted, first, strict=True)]
    assert [one.state for one in second] == ["submitted" if new else "under way already" for new in submitted]
    calls = Path("calls").read_text().splitlines()[3:]
    assert [call.split("afterok:")[1].split()[0] for call in calls if "afterok" in call] == waits_for


def test_waiting_for_nodes_ends_in_time() -> None:
    environment = os.environ | {"RAY_ADDRESS": "127.0.0.1:1"}
    command = [sys.executable, "-m", "launch.clusters.ray_nodes", "--nodes", "2", "--limit-s", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "nothing listens at 127.0.0.1:1" in done.stderr


def test_a_condition_is_asked_until_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_nodes, "INTERVAL_S", 0.0)
    answers = [False, False, True]
    assert ray_nodes.wait_until(lambda: answers.pop(0), end=float("inf"))
    assert answers == []


def test_records_are_json_of_one_line(tmp_path: Path) -> None:
    journal.append(tmp_path, submission(label="train a\nb"))
    (line,) = (tmp_path / journal.JOURNAL).read_text().splitlines()
    assert json.loads(line)["label"] == "train a\nb"
