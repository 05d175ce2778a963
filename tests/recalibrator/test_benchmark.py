"""The benchmark of the Recalibrator runs in its quick form, and its exact figure meets its bar."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_quick_benchmark_gives_all_figures(tmp_path):
    options = ["--quick", "--json", str(tmp_path / "values.json"), "--details", str(tmp_path / "details.json")]
    command = [sys.executable, "benchmarks/recalibrator_step.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "details.json").read_text())["figures"]
    values = json.loads((tmp_path / "values.json").read_text())
    assert values == {f"{figure['section']}: {figure['name']}": figure["value"] for figure in figures}
    assert [name for name in values if "against the student's" in name]
    assert [name for name in values if "packed against padded" in name]
    (exact,) = (figure for figure in figures if figure["unit"] == "millionths")
    assert exact["met"] is True
    assert exact["value"] > 0, "other shapes round differently: nothing was compared"
