"""A run from `genrecal submit ray` to the exported student, on a Ray cluster of two nodes that asks for a token."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.launch.small_run import write_small_run
from tests.ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"


def wait_for(condition: Callable[[], bool], *, what: str, logs: Path, limit_s: float = 600) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            texts = "\n".join(
                f"== {path}\n{path.read_text()[-3000:]}" for path in sorted(logs.rglob("job-driver-*.log"))
            )
            raise TimeoutError(f"no {what} within {limit_s:.0f} s\n{texts}")
        time.sleep(0.5)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str], Path]]:
    """Two nodes of two CPUs; yields the dashboard's address, the environment of a client, and the folder of logs."""
    # a short path: Ray puts sockets below it
    folder = Path(f"/tmp/genrecal-ray-test-{os.getpid()}")
    token = tmp_path_factory.mktemp("token") / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    hidden = ("RAY_", "HF_TOKEN")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PYTHONPATH": str(ROOT)}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0"}
    port, dashboard = free_port(), free_port()
    common = ["--num-cpus=2", "--node-ip-address=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0", "--block"]
    head = ["--head", f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    head += ["--include-dashboard=true", f"--temp-dir={folder}", f"--ray-client-server-port={free_port()}"]
    nodes: list[subprocess.Popen[bytes]] = []
    outputs: list[Path] = []

    def start(*options: str) -> None:
        outputs.append(token.parent / f"ray-{len(nodes)}.out")
        with outputs[-1].open("wb") as log:
            command = [str(RAY), "start", *options, *common, "--dashboard-agent-listen-port=0"]
            nodes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))

    def came_up(*options: str, sign: Callable[[], bool]) -> None:
        """Start a node, again where Ray did not come up within its own 30 s on a busy machine."""
        for _ in range(3):
            start(*options)
            wait_for(lambda: sign() or nodes[-1].poll() is not None, what="Ray node", logs=folder)
            if nodes[-1].poll() is None:
                return

    try:
        address = f"http://127.0.0.1:{dashboard}"
        came_up(*head, sign=lambda: status(address) == 401 and "runtime started" in outputs[-1].read_text())
        came_up(f"--address=127.0.0.1:{port}", sign=lambda: "runtime started" in outputs[-1].read_text())
        client = environment | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
        command = [sys.executable, "-m", "launch.clusters.ray_nodes", "--nodes=2", "--limit-s=300"]
        subprocess.run(command, env=client, check=True, cwd=ROOT)
        yield address, environment, folder
    finally:
        for node in nodes:
            end_session(node)


def end_session(process: subprocess.Popen[bytes]) -> None:
    """End a process and everything that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


def status(address: str, token: str | None = None) -> int:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{address}/api/jobs/", headers=headers), timeout=5
        ) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def genrecal(*arguments: str, environment: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.cli", *arguments]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)


def rank_of(number: int, *, run_file: str) -> psutil.Process | None:
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "train" in words and run_file in words and "launch.cli" in words:
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RANK") == str(number):
                    return process
    return None


def test_a_run_survives_a_killed_trainer_and_is_not_run_twice(
    cluster: tuple[str, dict[str, str], Path],
    tiny_qwen2_vl: Path,
    tiny_internvl: Path,
    digit_samples: Path,
    tmp_path: Path,
) -> None:
    address, environment, logs = cluster
    resources = {"gpus_per_node": 0, "cpus_per_node": 1}
    ray = {"address": address, "python": sys.executable, "train": resources | {"nodes": 2}, "report": resources}
    run_file = write_small_run(
        tmp_path, teacher=tiny_qwen2_vl, student=tiny_internvl, data=digit_samples, cluster={"ray": ray}
    )
    output_dir = tmp_path / "run"

    def submit(**extra: str) -> list[dict[str, object]]:
        done = genrecal("submit", "ray", str(run_file), "--json", environment=environment | extra, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    canary = "canary-91c3"
    assert status(address, "wrong") in (401, 403)
    refused = genrecal(
        "submit", "ray", str(run_file), environment=environment | {"RAY_AUTH_TOKEN": "wrong"}, cwd=tmp_path
    )
    assert refused.returncode == 2
    assert "does not accept this client's token" in refused.stderr

    submitted = submit(HF_TOKEN=canary)
    assert [outcome["state"] for outcome in submitted] == ["submitted"] * 3
    assert [outcome["state"] for outcome in submit()] == ["under way already"] * 3
    frozen = str(next((output_dir / "submit" / "run-files").iterdir()))
    assert not (output_dir / "training").exists(), "training began before the cache was complete"
    align = output_dir / "training" / "small" / "align"
    wait_for(lambda: any(align.rglob("COMMIT.json")), what="checkpoint", logs=logs)
    victim = rank_of(1, run_file=frozen)
    assert victim is not None
    victim.send_signal(signal.SIGKILL)
    wait_for(lambda: (output_dir / "report.html").exists(), what="report", logs=logs)

    def listed() -> dict[str, tuple[object, object]]:
        done = genrecal("jobs", str(tmp_path), "--json", environment=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return {entry["submission"]["label"]: (entry["state"], entry["complete"]) for entry in json.loads(done.stdout)}

    wait_for(lambda: listed()["report"][0] == "SUCCEEDED", what="end of the last job", logs=logs)
    assert listed() == dict.fromkeys(("cache", "train small", "report"), ("SUCCEEDED", True))
    assert (output_dir / "students" / "small" / "model.safetensors").is_file()
    assert [outcome["state"] for outcome in submit()] == ["complete already"] * 3
    assert "attempt 1 of 5 ended" in "".join(path.read_text() for path in logs.rglob("job-driver-*train*.log"))
    for path in (*tmp_path.rglob("*.json*"), *tmp_path.rglob("*.yaml"), *logs.rglob("*.log")):
        assert canary not in path.read_text(errors="replace"), path
