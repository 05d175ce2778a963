"""A student trained in a real Ray Train job, one of whose workers is killed, equals one trained without Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distill.small_cache import build_small_cache, write_data
from tests.launch.small_run import write_small_run

KILLED = """
import os, signal, sys, threading, time
from pathlib import Path

import psutil
import ray

from launch.ray_train import train_with_ray
from launch.run_config import load_run_config

config = load_run_config(sys.argv[1], [])
checkpoints = Path(config.output_dir) / "training" / "small" / "align" / "checkpoints"

def kill_a_worker():
    while not list(checkpoints.glob("*/COMMIT.json")):
        time.sleep(0.01)
    workers = [one for one in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(one.cmdline())]
    workers[0].send_signal(signal.SIGKILL)
    print("killed one of", len(workers), flush=True)

threading.Thread(target=kill_a_worker, daemon=True).start()
ray.init(address="local", num_cpus=3, include_dashboard=False)
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


@pytest.mark.slow
def test_a_ray_train_job_that_loses_a_worker_trains_the_same_student(
    tiny_qwen2_vl: Path, tiny_internvl: Path, tmp_path: Path
) -> None:
    data = write_data(tmp_path / "data", num_samples=12)
    cache = build_small_cache(tmp_path, teacher=tiny_qwen2_vl, data=data)
    run_file = write_small_run(tmp_path, teacher=tiny_qwen2_vl, student=tiny_internvl, data=data, cluster={})
    values = yaml.safe_load(run_file.read_text())
    values |= {"cache": cache.model_dump(mode="json"), "evaluation": None}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "RAY_AUTH_MODE": "disabled"}
    commands = {
        "ray": [sys.executable, "-c", KILLED],
        "launcher": [sys.executable, "-m", "launch.cli", "train"],
    }
    for name, command in commands.items():
        values["output_dir"] = str(tmp_path / name)
        run_file.write_text(yaml.safe_dump(values))
        done = subprocess.run([*command, str(run_file)], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        assert name == "launcher" or "killed one of 2" in done.stdout
        assert (tmp_path / name / "students" / "small" / "config.json").exists()
    assert len(losses(tmp_path / "ray")) == 14
    assert losses(tmp_path / "ray") == losses(tmp_path / "launcher")
