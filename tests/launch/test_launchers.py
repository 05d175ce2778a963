"""A student trained under torchrun, deepspeed, or in a Ray Train job that loses a worker: the same as without them."""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distill.small_cache import build_small_cache, write_data
from tests.launch.small_run import write_small_run
from tests.ports import free_port

KILLED = """
import contextlib, os, signal, sys, threading, time
from pathlib import Path

import psutil
import ray

from launch.ray_train import train_with_ray
from launch.run_config import load_run_config
from teacher_cache.build import start_ray

config = load_run_config(sys.argv[1], [])
checkpoints = Path(config.output_dir) / "training" / "small" / "align" / "checkpoints"

def kill_a_worker():
    while not list(checkpoints.glob("*/COMMIT.json")):
        time.sleep(0.01)
    workers = []
    for one in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "RayTrainWorker" in " ".join(one.cmdline()):
                workers.append(one)
    workers[0].send_signal(signal.SIGKILL)
    print("killed one of", len(workers), flush=True)

threading.Thread(target=kill_a_worker, daemon=True).start()
start_ray(ray, address="local", num_cpus=3, include_dashboard=False)
train_with_ray(config)
ray.shutdown()
"""


def losses(output_dir: Path) -> list[tuple[str, int, float]]:
    found = []
    for path in sorted((output_dir / "training" / "small").glob("*/metrics.jsonl")):
        for line in path.read_text().splitlines():
            record: dict[str, Any] = json.loads(line)
            found.append((path.parent.name, record["global_step"], record["train/loss"]))
    return found


@pytest.fixture(scope="module")
def values(tiny_qwen2_vl: Path, tiny_internvl: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run file whose cache is built."""
    folder = tmp_path_factory.mktemp("launchers")
    data = write_data(folder / "data", num_samples=12)
    cache = build_small_cache(folder, teacher=tiny_qwen2_vl, data=data)
    run_file = write_small_run(folder, teacher=tiny_qwen2_vl, student=tiny_internvl, data=data, cluster={})
    return yaml.safe_load(run_file.read_text()) | {"cache": cache.model_dump(mode="json"), "evaluation": None}


def train(values: dict[str, Any], folder: Path, *command: str) -> str:
    """Train in a folder and return what was printed."""
    folder.mkdir()
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump(values | {"output_dir": str(folder)}))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "RAY_AUTH_MODE": "token"}
    environment |= {"RAY_AUTH_TOKEN": secrets.token_hex(32), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*command, str(run_file)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert (folder / "students" / "small" / "config.json").exists()
    return done.stdout


@pytest.fixture(scope="module")
def expected(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int, float]]:
    """The losses of `genrecal train`, which starts its processes itself."""
    folder = tmp_path_factory.mktemp("expected") / "run"
    train(values, folder, sys.executable, "-m", "launch.cli", "train")
    found = losses(folder)
    assert len(found) == 14
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("torchrun", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m"),
        ("deepspeed", "--num_gpus=2", "--master_port={port}", "--module"),
    ],
    ids=["torchrun", "deepspeed"],
)
def test_a_launcher_trains_the_same_student(
    command: tuple[str, ...], values: dict[str, Any], expected: list[tuple[str, int, float]], tmp_path: Path
) -> None:
    port = free_port()
    launcher = str(Path(sys.executable).parent / command[0])
    options = [option.format(port=port) for option in command[1:]]
    train(values, tmp_path / "run", launcher, *options, "launch.cli", "train")
    assert losses(tmp_path / "run") == expected


@pytest.mark.slow
def test_a_ray_train_job_that_loses_a_worker_trains_the_same_student(
    values: dict[str, Any], expected: list[tuple[str, int, float]], tmp_path: Path
) -> None:
    printed = train(values, tmp_path / "run", sys.executable, "-c", KILLED)
    assert "killed one of 2" in printed
    assert losses(tmp_path / "run") == expected
