"""The start of a training on a bare machine: nothing is compiled, and nothing waits for ever."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill.config import StudentConfig
from distill.preflight import stale_build_locks, warn_of_stale_locks
from tests.distill.small_cache import build_small_cache, write_data
from tests.distill.test_zero import settings


@pytest.mark.slow
def test_nothing_is_compiled_and_disagreeing_inputs_are_refused(
    tmp_path: Path, tiny_qwen2_vl: Path, tiny_internvl: Path
) -> None:
    data = write_data(tmp_path / "data", num_samples=18, text_only=(1, 4))
    cache = build_small_cache(tmp_path, teacher=tiny_qwen2_vl, data=data)
    student = StudentConfig(name="tiny", model=str(tiny_internvl), dtype="float32", max_length=512)
    inputs = {
        "cache": cache.model_dump(mode="json"),
        "student": student.model_dump(mode="json"),
        "train": settings(num_processes=2),
    }
    (tmp_path / "inputs.json").write_text(json.dumps(inputs))
    extensions = tmp_path / "extensions"
    extensions.mkdir()
    script = Path(__file__).with_name("start_scenario.py")
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "CC")} | {
        "PATH": "",
        "HOME": "/proc/nowhere",  # which nobody can write to
        "TORCH_EXTENSIONS_DIR": str(extensions),
        "PYTHONPATH": str(script.parents[2]),
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished = subprocess.run(
        [*command, str(script), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    assert list(extensions.iterdir()) == []
    for rank, own in enumerate((".batch.input_ids", ".batch.input_ids, .batch.pixel_values")):
        refused = (tmp_path / f"refused-{rank}").read_text()
        assert refused.startswith("processes 1 bring other inputs")
        assert f"process {rank} has {own}. Every" in refused


def test_a_lock_that_nobody_holds_is_found(tmp_path: Path) -> None:
    for name in ("held", "stale"):
        (tmp_path / name).mkdir()
    stale = tmp_path / "stale" / "lock"
    stale.touch()
    with (tmp_path / "held" / "lock").open("w"):
        assert stale_build_locks(tmp_path) == [stale]


def test_a_stale_lock_is_named_and_nothing_waits_for_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lock = tmp_path / "async_io" / "lock"
    lock.parent.mkdir()
    lock.touch()
    warn_of_stale_locks({"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    assert f"a dead build left its lock: {lock}" in caplog.text
