"""What is sent to a Ray cluster: golden file, hostile values, and the refusal of a cluster that asks for no token."""

import http.server
import logging
import os
import shlex
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.clusters import ray_driver, ray_ranks
from launch.clusters.config import ClusterConfig, RayConfig
from launch.clusters.jobs import run_jobs
from launch.clusters.node_ranks import NodePlace, decisive, run_ranks
from launch.clusters.ray_ranks import too_small
from launch.clusters.ray_submit import connect, dashboard_address, describe_ray, plan_ray
from launch.run_config import RunConfig
from teacher_cache.errors import ConfigError, GenrecalError
from tests.launch.golden import compare
from tests.launch.hostile import HOSTILE
from tests.launch.test_submit_slurm import VALUES


def run_config(**ray: object) -> RunConfig:
    return RunConfig.model_validate(VALUES | {"output_dir": "/shared/run", "cluster": {"ray": ray}})


def test_submissions_are_those_that_were_reviewed() -> None:
    config = run_config(working_dir="/shared", python="/opt/venv/bin/python", environment_file="/etc/genrecal.env")
    compare("ray/jobs.yaml", describe_ray(config))


def test_every_job_waits_for_those_before_it() -> None:
    config = run_config()
    jobs = run_jobs(config)
    entrypoints = {job.label: shlex.split(ray.entrypoint) for job, ray in plan_ray(config, jobs)}
    after = {
        label: [words[index + 1] for index, word in enumerate(words) if word == "--after"]
        for label, words in entrypoints.items()
    }
    assert after == {
        "cache": [],
        "train internvl": ["cache"],
        "train qwen2-vl": ["cache"],
        "report": ["train internvl", "train qwen2-vl"],
    }


def check_words(value: str) -> None:
    hostile = RayConfig.model_validate({"python": value, "working_dir": value, "environment_file": value})
    config = run_config().model_copy(update={"cluster": ClusterConfig(ray=hostile)})
    for job, ray in plan_ray(config, run_jobs(config)):
        words = shlex.split(ray.entrypoint)
        assert words[:7] == [".", value, "&&", "cd", value, "&&", "exec"]
        assert words[7:11] == [value, "-m", "launch.clusters.ray_driver", job.kind]


@pytest.mark.parametrize("value", [value for value in HOSTILE if value.isprintable()])
def test_hostile_values_are_single_words(value: str) -> None:
    check_words(value)
    config = run_config(working_dir=value)
    entrypoint = plan_ray(config, run_jobs(config))[0][1].entrypoint
    printed = subprocess.run(
        ["bash", "-c", entrypoint.replace("exec ", "exec printf '%s\\n' ").replace("cd ", "printf '%s\\n' ", 1)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout.split("\n")[0] == value.split("\n")[0]


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=40).filter(str.isprintable))
def test_any_printable_text_is_one_word(value: str) -> None:
    check_words(value)


def test_nothing_of_the_environment_is_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-5f1e")
    config = run_config()
    for _, ray in plan_ray(config, run_jobs(config)):
        assert set(vars(ray)) == {"submission_id", "entrypoint", "metadata"}
        assert "canary" not in str(ray)


class Dashboard(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def open_dashboard() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), Dashboard) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_cluster_without_a_token_is_refused(open_dashboard: str) -> None:
    with pytest.raises(ConfigError, match=r"answers without a token.*--insecure"):
        connect(open_dashboard, insecure=False)


def test_a_token_that_others_may_read_is_not_sent(
    open_dashboard: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Dashboard, "status", 401)
    token = tmp_path / "token"
    token.write_text("a" * 64)
    token.chmod(0o640)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    with pytest.raises(ConfigError, match=r"others may use the token.*chmod 600.*--insecure"):
        connect(open_dashboard, insecure=False)


def test_what_neither_answers_nor_refuses_gets_no_work(open_dashboard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dashboard, "status", 500)
    with pytest.raises(GenrecalError, match=r"answers 500.*expected 200, 401 or 403"):
        connect(open_dashboard, insecure=False)
    monkeypatch.setattr(Dashboard, "protocol_version", "no HTTP")
    with pytest.raises(GenrecalError, match="no Ray dashboard"):
        connect(open_dashboard, insecure=False)


def test_a_dashboard_that_is_not_there_is_named() -> None:
    with pytest.raises(GenrecalError, match=r"no Ray dashboard at http://127\.0\.0\.1:1"):
        connect("http://127.0.0.1:1", insecure=True)


@pytest.mark.parametrize("address", ["ray://head:10001", "head:8265", "file:///etc/passwd", "auto"])
def test_addresses_that_are_no_dashboard_are_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="expected its dashboard"):
        dashboard_address(address)


@pytest.mark.parametrize(
    ("codes", "expected", "calls"),
    [
        ([0], 0, 1),
        ([3, 0], 0, 2),
        ([137, 143, 0], 0, 3),
        ([4], 4, 1),
        ([2], 2, 1),
        ([1], 1, 1),
        ([3, 3, 3, 0], 3, 3),
    ],
)
def test_what_is_tried_again(codes: list[int], expected: int, calls: int) -> None:
    left = list(codes)
    assert ray_driver.attempt(lambda: left.pop(0), attempts=3) == expected
    assert len(codes) - len(left) == calls


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], 0),
        ([-9, 4], 4),
        ([1, -15], 1),
        ([1, 137], 137),
        ([1, -9, -15], 137),
        ([-9, 0], 137),
        ([3, 1], 3),
        ([1, 2], 2),
    ],
)
def test_the_code_that_says_most_wins(codes: list[int], expected: int) -> None:
    assert decisive(codes) == expected


class Cluster:
    """Stands for Ray's client; gives one answer per call, the last one for ever."""

    def __init__(self, *answers: dict[str, str] | Exception) -> None:
        self.answers = list(answers)

    def __call__(self, address: str | None) -> "Cluster":
        return self

    def list_jobs(self) -> list[SimpleNamespace]:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return [
            SimpleNamespace(submission_id=name, status=SimpleNamespace(value=status), message="why")
            for name, status in answer.items()
        ]


LABELS = {"id-cache": "cache", "id-a": "train a"}


def test_a_dashboard_that_fails_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    faults = [
        ConnectionError("gone"),
        RuntimeError("Request failed with status code 500"),
        requests.exceptions.ReadTimeout("slow"),
    ]
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Cluster(*faults, {"id-cache": "FAILED"}))
    before = ray_driver.Predecessors(LABELS)
    with caplog.at_level(logging.WARNING):
        assert [before.ended() for _ in faults] == [{}] * len(faults)
    assert len(caplog.records) == 1
    assert before.ended() == {"cache": "id-cache is FAILED: why"}


def test_a_job_that_succeeded_without_marks_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"id-cache": "SUCCEEDED", "id-a": "RUNNING", "other": "FAILED"}
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Cluster(states))
    before = ray_driver.Predecessors(LABELS)
    assert before.ended() == {}, "its marks may not be visible on this node yet"
    monkeypatch.setattr(ray_driver, "MARKS_LATE_S", 0.0)
    assert before.ended() == {"cache": "id-cache is SUCCEEDED: why"}


def test_a_job_that_is_run_again_after_it_succeeded_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [{"id-cache": status} for status in ("SUCCEEDED", "RUNNING", "SUCCEEDED")]
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Cluster(*answers))
    clock = iter((0.0, 1.0, ray_driver.MARKS_LATE_S, 3 * ray_driver.MARKS_LATE_S))
    monkeypatch.setattr(ray_driver.time, "monotonic", lambda: next(clock))
    before = ray_driver.Predecessors(LABELS)
    assert [list(before.ended()) for _ in range(4)] == [[], [], [], ["cache"]]


def test_waiting_ends_where_the_marks_of_a_success_are_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_driver, "MARKS_LATE_S", 0.0)
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Cluster({"id-cache": "SUCCEEDED"}))
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(yaml.safe_dump(VALUES))
    waiting = ["--after", "cache", "--after-id", "id-cache", "--wait-s", "600"]
    assert ray_driver.main(["train", "run.yaml", "--student", "internvl", *waiting]) == 4
    assert "cache of run.yaml will not become complete: id-cache is SUCCEEDED" in capsys.readouterr().err


def node(address: str, alive: bool = True, **resources: float) -> dict[str, object]:
    return {"Alive": alive, "NodeManagerAddress": address, "Resources": resources}


def test_nodes_that_are_too_small_are_named() -> None:
    large, small = node("10.0.0.1", CPU=64, GPU=8), node("10.0.0.2", CPU=64, GPU=4)
    bundle = {"CPU": 8.0, "GPU": 8}
    assert too_small([large, small], bundle, nodes=1) == ""
    assert too_small([large, small], bundle, nodes=2) == (
        "2 node(s) with 8 CPU(s), 8 GPU(s) each are needed, of which the Ray cluster has 1 (10.0.0.2 has 64 CPU(s), "
        "4 GPU(s))"
    )
    assert "has 0" in too_small([node("10.0.0.3", alive=False, CPU=64, GPU=8)], bundle, nodes=1)
    assert "10.0.0.4 has 4 CPU(s), 0 GPU(s)" in too_small([node("10.0.0.4", CPU=4)], bundle, nodes=1)


class Reservation:
    """Stands for Ray while a placement group waits; the group is ready after so many looks."""

    def __init__(self, nodes: list[dict[str, object]], *, looks: int) -> None:
        self.left, self._nodes = looks, nodes

    def ready(self) -> str:
        return "ready"

    def wait(self, waiting: list[str], *, timeout: float) -> tuple[list[str], list[str]]:
        self.left -= 1
        return ([], waiting) if self.left >= 0 else (waiting, [])

    def nodes(self) -> list[dict[str, object]]:
        return self._nodes


def test_a_reservation_that_no_node_holds_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter(range(0, 10**6, 400))
    monkeypatch.setattr(ray_ranks.time, "monotonic", lambda: next(clock))
    ray, bundle = Reservation([node("10.0.0.2", CPU=64, GPU=4)], looks=1000), {"CPU": 8.0, "GPU": 8}
    with pytest.raises(ConfigError, match=r"10\.0\.0\.2 has 64 CPU\(s\), 4 GPU\(s\)\); lower gpus_per_node"):
        ray_ranks._wait_for_reservation(ray, ray, bundle, nodes=1)
    assert ray.left > 990, "other nodes are waited for too long"
    assert len(caplog.records) == 1
    busy = Reservation([node("10.0.0.1", CPU=64, GPU=8)], looks=500)
    ray_ranks._wait_for_reservation(busy, busy, bundle, nodes=1)
    assert busy.left == -1


def place(**changes: int) -> NodePlace:
    values = {"node": 1, "nodes": 3, "processes_per_node": 2, "master_port": 7}
    return NodePlace(**(values | changes), master_address="first")


def test_ranks_of_a_node_get_the_five_variables(tmp_path: Path) -> None:
    names = "$RANK $WORLD_SIZE $LOCAL_RANK $MASTER_ADDR $MASTER_PORT"
    command = ["bash", "-c", f'echo "{names}" >{tmp_path}/$RANK']
    assert run_ranks(command, place=place(), log_dir=tmp_path / "logs") == 0
    assert {path.name: path.read_text().split() for path in tmp_path.iterdir() if path.is_file()} == {
        "2": ["2", "6", "0", "first", "7"],
        "3": ["3", "6", "1", "first", "7"],
    }


def test_a_failed_rank_ends_the_others_and_its_reason_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.clusters.node_ranks.GRACE_S", 0.2)
    command = ["bash", "-c", '[ "$RANK" = 3 ] && exit 4; exec sleep 60']
    assert run_ranks(command, place=place(), log_dir=tmp_path) == 4


def test_output_of_ranks_beside_the_first_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_ranks(["bash", "-c", "echo from $RANK"], place=place(), log_dir=tmp_path)
    assert capfd.readouterr().out == "from 2\n"
    assert (tmp_path / "rank3.log").read_text() == "from 3\n"


def test_the_token_is_not_in_the_environment_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "canary-77")
    assert "canary" not in describe_ray(run_config())
    assert os.environ["RAY_AUTH_TOKEN"] == "canary-77"
