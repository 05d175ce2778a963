"""Through ZeRO-3, neither processes nor micro-batches change losses, gradients and skipped samples."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.config import StudentConfig
from tests.distill.batch_scenarios import CUTS, CUTS_OF_ONE_PROCESS, STAGES
from tests.distill.small_cache import build_small_cache, write_data

RUNS = [*(f"{name}-1" for name in CUTS_OF_ONE_PROCESS), *(f"{name}-2" for name in CUTS)]
# not a multiple of anything
STAGE = {"global_batch_size": 13, "max_steps": 2, "learning_rate": 1e-3, "adam_epsilon": 1e-3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2_vl: Path, tiny_internvl: Path) -> Path:
    """Every cut through one process and through two."""
    folder = tmp_path_factory.mktemp("batches")
    data = write_data(folder / "data", num_samples=17, text_only=(1, 3, 4, 9, 12, 13), multi_turn=(2, 7))
    without = [f"s{index:03d}" for index in range(0, 17, 2)]
    cache = build_small_cache(folder, teacher=tiny_qwen2_vl, data=data, without_question_rows=without)
    # the longer one of the two conversations of two turns is too long
    student = StudentConfig(
        name="tiny", model=str(tiny_internvl), dtype="float32", max_length=112, max_skipped_samples=1
    )
    inputs = {
        "cache": cache.model_dump(mode="json"),
        "student": student.model_dump(mode="json"),
        "train": dict.fromkeys(STAGES, STAGE) | {"zero": {"persistence_threshold": 0}},
    }
    (folder / "inputs.json").write_text(json.dumps(inputs))
    script = Path(__file__).with_name("batch_scenarios.py")
    environment = os.environ | {"PYTHONPATH": str(script.parents[2]), "PYTHONWARNINGS": "ignore::FutureWarning"}
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        finished = subprocess.run(
            [*command, str(script), str(folder)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def learned(folder: Path, stage: str) -> list[dict[str, float]]:
    records = lines(folder / "training" / "tiny" / stage / "metrics.jsonl")
    kept = ("global_step", "optim/grad_norm", "data/skipped_samples")
    return [
        {
            name: value
            for name, value in record.items()
            if name in kept or (name.startswith("train/") and not name.endswith("_gap"))
        }
        for record in records
    ]


@pytest.mark.slow
def test_cuts_and_processes_change_no_loss_and_no_gradient(runs: Path) -> None:
    worst = 0.0
    for stage in STAGES:
        reference = learned(runs / "two-1", stage)
        assert [record["global_step"] for record in reference] == [1, 2]
        for name in RUNS:
            for left, right in zip(learned(runs / name, stage), reference, strict=True):
                assert left.keys() == right.keys()
                for metric, value in right.items():
                    worst = max(worst, abs(left[metric] - value) / max(abs(value), 1e-12))
                    assert left[metric] == pytest.approx(value, rel=1e-6), f"{stage} {name} {metric}"
    print(f"\nlosses and gradient norms: largest relative difference {worst:.1e}")


@pytest.mark.slow
def test_bad_samples_are_listed_once_whoever_met_them(runs: Path) -> None:
    for stage in STAGES:
        expected = lines(runs / "two-1" / "training" / "tiny" / stage / "skipped.jsonl")
        assert [(bad["sample_id"], bad["reason"]) for bad in expected] == [("s007", "too-long")]
        for name in RUNS:
            path = runs / name / "training" / "tiny" / stage
            assert lines(path / "skipped.jsonl") == expected
            counts = [record["data/skipped_samples"] for record in lines(path / "metrics.jsonl")]
            assert counts == [sum(bad["global_step"] <= step for bad in expected) for step in (1, 2)]
