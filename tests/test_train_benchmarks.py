"""The benchmark of training runs whole in its quick form, and what it compares is equal where it must be."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
NAMED = {
    "align_speedup_over_live_teacher",
    "distill_speedup_over_live_teacher",
    "data_wait_fraction",
    "trainer_overhead_fraction",
    "cached_vs_live_loss_relative_difference",
}


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("train-benchmark")
    values, details = folder / "values.json", folder / "details.json"
    options = ["--quick", "--json", str(values), "--details", str(details), "--folder", str(folder)]
    command = [sys.executable, "benchmarks/train.py", *options]
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800, env=environment)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["details.json", "values.json"], "scratch files stay"
    document: dict[str, Any] = json.loads(details.read_text())
    return {"values": json.loads(values.read_text()), **document}


def test_all_parts_give_figures(quick_run: dict[str, Any]) -> None:
    figures = quick_run["figures"]
    assert {one["section"] for one in figures} == {"speed", "trainings", "overhead", "cached = live"}
    named = {one["json_name"]: one for one in figures if one["json_name"]}
    assert named.keys() >= NAMED
    assert {name: quick_run["values"][name] for name in named} == {name: one["value"] for name, one in named.items()}
    for one in figures:
        assert one["low"] is None or one["low"] <= one["value"] <= one["high"]
    for name in ("align_speedup_over_live_teacher", "distill_speedup_over_live_teacher"):
        assert named[name]["value"] > 0
        assert named[name]["bar"] == {"a": 4, "d": 3}[name[0]]
    assert 0 <= named["data_wait_fraction"]["value"] < 1


def test_the_operations_of_the_teacher_are_counted(quick_run: dict[str, Any]) -> None:
    notes = [one["note"] for one in quick_run["figures"] if "FLOPs" in one["name"]]
    assert len(notes) == 2
    for note in notes:
        predicted = float(note.split()[1])
        assert predicted > 1.1, note


def test_losses_from_the_cache_are_those_of_the_live_teacher(quick_run: dict[str, Any]) -> None:
    assert quick_run["values"]["cached_vs_live_loss_relative_difference"] == 0
