"""The benchmark of micro-batches runs in its quick form."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_quick_benchmark_gives_all_figures(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/micro_batches.py", "--quick", "--json", str(tmp_path / "values.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / "values.json").read_text())
    assert len(values) == 2
    assert all(value > 0 for value in values.values())
