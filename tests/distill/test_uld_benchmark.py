"""The benchmark of aligned ULD runs in its quick form, with and without TRL."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_quick_benchmark_gives_all_figures(tmp_path: Path) -> None:
    options = ["--quick", "--json", str(tmp_path / "values.json"), "--details", str(tmp_path / "details.json")]
    command = [sys.executable, "benchmarks/uld.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "details.json").read_text())
    values = json.loads((tmp_path / "values.json").read_text())
    assert values == {f"{figure['section']}: {figure['name']}": figure["value"] for figure in document["figures"]}
    assert sum("time per token" in name for name in values) == 2
    differences = [figure for figure in document["figures"] if "difference from GOLD" in figure["name"]]
    assert bool(differences) == ("trl" in document["versions"])
    assert all(figure["met"] for figure in differences)
