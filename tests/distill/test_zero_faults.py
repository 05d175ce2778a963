"""R21 under ZeRO-3: a fault on one of two processes is skipped on both, and leaves nothing behind."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from distill.config import StudentConfig
from tests.distill.small_cache import build_small_cache, write_data
from tests.distill.zero_faults import FAULTS

STAGE = {"global_batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-3}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_fault_on_one_process_is_skipped_on_both(tmp_path: Path, tiny_qwen2_vl: Path, tiny_internvl: Path) -> None:
    data = write_data(tmp_path / "data", num_samples=18, text_only=(1, 3, 4, 9, 12, 13), multi_turn=(2, 7))
    cache = build_small_cache(tmp_path, teacher=tiny_qwen2_vl, data=data, without_question_rows=("s001", "s004"))
    student = StudentConfig(name="tiny", model=str(tiny_internvl), dtype="float32", max_length=512)
    inputs = {
        "cache": cache.model_dump(mode="json"),
        "student": student.model_dump(mode="json"),
        "train": {
            "num_processes": 2,
            "align": STAGE | {"max_steps": 12},
            "finetune": STAGE | {"max_steps": 5},
            "zero": {"persistence_threshold": 0},
            "faults": {"spike_min_steps": 4},
            "shuffle_gap_interval_steps": 4,
        },
    }
    (tmp_path / "inputs.json").write_text(json.dumps(inputs))
    script = Path(__file__).with_name("zero_faults.py")
    finished = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, tmp_path],
        env=os.environ | {"PYTHONPATH": str(script.parents[2]), "PYTHONWARNINGS": "ignore::FutureWarning"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]
    for stage, faults in FAULTS.items():
        faulty, passed = (tmp_path / name / stage / "training" / "tiny" / stage for name in ("faulty", "passed"))
        found = read(faulty / "faults.jsonl")
        assert [fault["global_step"] for fault in found] == [step for step, _, _ in faults]
        for fault, (_, rank, _) in zip(found, faults, strict=True):
            # a loss that is not finite says whose it is
            ranks = [share["rank"] for share in fault["shares"]]
            assert ranks == ([rank] if fault["kind"] == "loss not finite" else [0, 1])
            assert all(share["sample_ids"] for share in fault["shares"])
        kept = ("global_step", "train", "optim")
        left, right = (
            [
                {name: value for name, value in record.items() if name.split("/")[0] in kept}
                for record in read(run / "metrics.jsonl")
                if record["global_step"] not in {step for step, _, _ in faults}
            ]
            for run in (faulty, passed)
        )
        assert left == right
        weights = [load_file(run / "export" / "model.safetensors") for run in (faulty, passed)]
        assert all(weights[0][name].equal(weights[1][name]) for name in weights[1])
    count = sum(map(len, FAULTS.values()))
    print(f"R21: ZeRO-3, 2 processes: {count} of {count} faults skipped on both, 0 traces left")
