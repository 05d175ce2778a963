"""The short demo, run once for all tests that look at what it leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.demo.make_models import STUDENTS
from tests.launch.canaries import ENVIRONMENT
from tests.launch.process_tree import Watch

DEMO_COMMAND = [sys.executable, "-m", "launch.cli", "demo", "--quick", "--output"]


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The short demo's folder: killed with SIGKILL while it trains the first student, then run to its end."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "HF_HUB"))}
    environment |= {"RAY_AUTH_MODE": "token"} | ENVIRONMENT
    with Watch(os.getpid()) as watch:
        commits = _kill_while_training(folder, environment=environment)
        finished = subprocess.run(
            [*DEMO_COMMAND, str(folder)], env=environment, capture_output=True, text=True, check=False
        )
    seen = {"command_lines": sorted(watch.command_lines), "listening": sorted(watch.listening)}
    (folder.parent / "watched.json").write_text(json.dumps(seen))
    assert finished.returncode == 0, finished.stderr[-5000:]
    (folder / "stdout.txt").write_text(finished.stdout)
    (folder / "stderr.txt").write_text(finished.stderr)
    assert commits == _commits(folder)
    return folder


def _kill_while_training(folder: Path, *, environment: dict[str, str]) -> dict[str, int]:
    """Start the demo, kill it when its cache is complete and one stage is done, and return the cache's commits."""
    killed = subprocess.Popen([*DEMO_COMMAND, str(folder)], env=environment, start_new_session=True)
    trained = folder / "training" / next(iter(STUDENTS)) / "align" / "DONE.json"
    deadline = time.monotonic() + 600
    while not trained.exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert killed.poll() is None, "the demo ended before it could be killed"
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    return _commits(folder)


def _commits(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "cache" / "commits").iterdir()}
