"""The benchmarks of the losses and of the GPU run whole in their quick form, and their checks hold."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run(folder: Path, *command: str) -> dict[str, Any]:
    output = folder / "figures.json"
    done = subprocess.run(
        [sys.executable, *command, "--quick", "--json", "--details", str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(output.read_text())
    assert document["quick"] is True
    values = {f"{one['section']}: {one['name']}": one["value"] for one in document["figures"]}
    # libraries may print before
    assert json.loads(done.stdout[done.stdout.index("{") :]) == values
    return document


@pytest.mark.slow
def test_losses(tmp_path: Path) -> None:
    figures = run(tmp_path, "benchmarks/losses.py")["figures"]
    assert {one["section"] for one in figures} == {"exactness", "memory", "speed"}
    exact = [one for one in figures if one["section"] == "exactness"]
    assert len(exact) == 10
    missed = [one for one in exact if not one["met"]]
    # logits of thousands have no more digits in float32, for whoever computes them
    assert {one["name"] for one in missed} <= {"float32, saturated: relative error of the gradient"}
    assert all(one["value"] < 2 * float(one["note"].rpartition(" ")[2]) for one in missed), missed
    (memory,) = [one for one in figures if one["name"].startswith("genrecal: peak")]
    assert 0 < memory["value"] < 0.5
    assert next(one["value"] for one in figures if one["name"] == "CE + KL against dense torch") > 0


@pytest.mark.slow
def test_gpu_parts_on_a_cpu(tmp_path: Path) -> None:
    document = run(tmp_path, "benchmarks/gpu", "--device", "cpu")
    checks = [one for one in document["figures"] if one["section"].endswith("check")]
    assert {one["section"] for one in checks} == {
        "losses check",
        "recalibrator check",
        "zero-3 check",
        "shards check",
        "job check",
    }
    assert all(one["met"] for one in checks), checks
    assert {one["section"] for one in document["figures"]} >= {"speed", "recalibrator", "zero-3", "shards", "job"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="what it says without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, "benchmarks/gpu"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "sees no NVIDIA GPU; --quick --device cpu" in done.stderr
