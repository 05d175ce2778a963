"""R18: a checkpoint goes on with another number of processes: the same samples, the same numbers, every tensor."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distill.config import StudentConfig, TrainConfig
from distill.trainer import train_student
from launch.cli import main
from teacher_cache.config import CacheConfig
from teacher_cache.errors import CheckpointError
from tests.distill.small_cache import build_small_cache, write_data

pytestmark = pytest.mark.slow

TRAIN = {
    # frozen: vision encoder, projector, embeddings and head; trained: body and Recalibrator
    "stages": ["distill"],
    "distill": {"global_batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-3, "max_steps": 7},
    "zero": {"persistence_threshold": 0},
    "save_interval_steps": 2,
    "shuffle_gap_interval_steps": 100,
}
STAGE = Path("training/tiny/distill")


def launch(folder: Path, names: Sequence[str], *, num_processes: int) -> None:
    script = Path(__file__).with_name("zero_reshard.py")
    command = [sys.executable]
    if num_processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    finished = subprocess.run(
        [*command, str(script), str(folder), *names],
        env=os.environ
        | {"PYTHONPATH": str(script.parents[2]), "PYTHONWARNINGS": "ignore::FutureWarning", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]


def halted(folder: Path, name: str, *, copy: str) -> Path:
    """Copy a finished run as a kill before its end leaves it: its newest checkpoint is of step 6."""
    shutil.copytree(folder / name, folder / copy)
    for path in (folder / copy).glob("order-*"):
        path.unlink()
    (folder / copy / STAGE / "DONE.json").unlink()
    shutil.rmtree(folder / copy / STAGE / "export")
    return folder / copy


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2_vl: Path, tiny_internvl: Path) -> Path:
    """Runs of two processes and of one, and each gone on with by the other number after step 4."""
    folder = tmp_path_factory.mktemp("reshard")
    data = write_data(folder / "data", num_samples=18, text_only=(1, 3, 4, 9, 12, 13), multi_turn=(2, 7))
    cache = build_small_cache(folder, teacher=tiny_qwen2_vl, data=data)
    student = StudentConfig(name="tiny", model=str(tiny_internvl), dtype="float32", max_length=512)
    inputs = {"cache": cache.model_dump(mode="json"), "student": student.model_dump(mode="json"), "train": TRAIN}
    (folder / "inputs.json").write_text(json.dumps(inputs))
    launch(folder, ["two"], num_processes=2)
    assert main(["reshard", str(halted(folder, "two", copy="two-one") / STAGE)]) == 0
    launch(folder, ["two-one", "one"], num_processes=1)
    assert main(["reshard", str(halted(folder, "one", copy="one-two") / STAGE)]) == 0
    launch(folder, ["one-two"], num_processes=2)
    return folder


def order(run: Path) -> dict[int, Counter[str]]:
    """Return the samples of each step, over all processes."""
    found: dict[int, Counter[str]] = {}
    for path in run.glob("order-*.jsonl"):
        for line in path.read_text().splitlines():
            step, ids = json.loads(line)
            found.setdefault(step, Counter()).update(ids)
    return found


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / STAGE / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("before", "after"), [("two", "two-one"), ("one", "one-two")])
def test_another_number_of_processes_goes_on_with_the_same_numbers(before: str, after: str, runs: Path) -> None:
    whole, changed = order(runs / before), order(runs / after)
    assert sorted(changed) == [6]
    assert all(changed[step] == whole[step] for step in changed)
    worst = 0.0
    for left, right in zip(metrics(runs / before), metrics(runs / after), strict=True):
        for name in ("train/loss", "train/ce_loss", "train/kl_loss", "train/sft_loss"):
            worst = max(worst, abs(left[name] / right[name] - 1))
    assert worst < 1e-6
    print(f"R18: {after}: the same samples, losses within {worst:.1e}, every tensor compared")


def test_without_it_another_number_is_refused_and_the_command_named(runs: Path) -> None:
    run = halted(runs, "two", copy="refused")
    inputs = json.loads((runs / "inputs.json").read_text())
    for backend, message in (("zero3", f"genrecal reshard {run / STAGE}"), ("torch", "backend zero3, which backend")):
        with pytest.raises(CheckpointError, match=message) as raised:
            train_student(
                cache=CacheConfig.model_validate(inputs["cache"]),
                student=StudentConfig.model_validate(inputs["student"]),
                train=TrainConfig.model_validate(TRAIN | {"backend": backend}),
                output_dir=run,
            )
        assert raised.value.exit_code == 4


@pytest.mark.parametrize(
    ("run", "tag"), [("two", "step-00000006"), ("one", "step-00000004"), ("two-one", "step-00000006-any")]
)
def test_a_checkpoint_exports_the_bytes_of_the_trainer(run: str, tag: str, runs: Path, tmp_path: Path) -> None:
    assert main(["export", str(runs / run / STAGE / "checkpoints" / tag), str(tmp_path / "out")]) == 0
    step = int(tag.split("-")[1])
    for expected in (runs / run / f"export-{step}").iterdir():
        assert (tmp_path / "out" / expected.name).read_bytes() == expected.read_bytes(), expected.name
