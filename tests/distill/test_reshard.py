"""R18: a checkpoint goes on with another number of processes: the same samples, the same numbers, every tensor."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from distill import zero_files
from distill.checkpoint import Record, commit, committed_tags, intact_checkpoint
from distill.config import StudentConfig, TrainConfig
from distill.reshard import reshard, resharded_tensors
from distill.trainer import train_student
from distill.zero_files import MASTER, MOMENTS
from launch.cli import main
from teacher_cache.config import CacheConfig
from teacher_cache.errors import CheckpointError
from tests.distill.reshard_memory import LARGEST_MIB, TAG, peak_of_reshard, write_large_stage, write_stage
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
    """Copy a finished run as a kill before its last save leaves it: its newest checkpoint is of step 6."""
    shutil.copytree(folder / name, folder / copy)
    for path in (folder / copy).glob("order-*"):
        path.unlink()
    (folder / copy / STAGE / "DONE.json").unlink()
    shutil.rmtree(folder / copy / STAGE / "checkpoints/step-00000007")
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
    ("run", "tag"), [("two", "step-00000006"), ("one", "step-00000007"), ("two-one", "step-00000006-any")]
)
def test_a_checkpoint_exports_the_bytes_of_the_trainer(run: str, tag: str, runs: Path, tmp_path: Path) -> None:
    assert main(["export", str(runs / run / STAGE / "checkpoints" / tag), str(tmp_path / "out")]) == 0
    step = int(tag.split("-")[1])
    for expected in (runs / run / f"export-{step}").iterdir():
        assert (tmp_path / "out" / expected.name).read_bytes() == expected.read_bytes(), expected.name


TRAINED = [
    {"body.norm": (1,), "body.weight": (7, 5), "body.bias": (3,)},
    {"head.weight": (4, 6), "head.bias": (2,)},
]
"""Two groups of the optimizer; most sizes are no multiple of three."""
FROZEN = {"vision.weight": torch.arange(10, dtype=torch.bfloat16).view(5, 2), "vision.scale": torch.tensor([0.5])}
BUFFERS = {"count": torch.tensor(3), "table": torch.arange(4.0).expand(2, 4)}


def trained_states() -> list[dict[str, dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    kinds = (MASTER, *MOMENTS)
    return [
        {name: {kind: torch.randn(shape, generator=generator) for kind in kinds} for name, shape in group.items()}
        for group in TRAINED
    ]


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("in_zip_files", [True, False])
def test_it_writes_what_deepspeeds_converter_does_and_what_that_leaves_out(
    world_size: int, in_zip_files: bool, tmp_path: Path
) -> None:
    from deepspeed.checkpoint import ds_to_universal

    trained = trained_states()
    write_stage(
        tmp_path,
        world_size=world_size,
        trained=trained,
        frozen=FROZEN,
        buffers=BUFFERS,
        in_zip_files=in_zip_files,
    )
    tag = reshard(tmp_path)
    arguments = argparse.Namespace(
        input_folder=str(tmp_path / TAG),
        output_folder=str(tmp_path / "universal"),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    ds_to_universal.main(arguments)
    tensors = {name: states for group in trained for name, states in group.items()}
    for name, states in tensors.items():
        for kind, tensor in states.items():
            part = Path("zero", name, f"{kind}.pt")
            found = torch.load(tag / part)
            assert torch.equal(found, tensor.flatten()), part
            assert torch.equal(found, torch.load(tmp_path / "universal" / part)), part
    read = resharded_tensors(tag)
    assert len(read) == 3 * len(tensors) + len(FROZEN) + len(BUFFERS)
    for kind, expected in (("frozen", FROZEN), ("buffer", BUFFERS)):
        for name, tensor in expected.items():
            found = read[f"{kind}:{name}"]()
            assert found.dtype == tensor.dtype, name
            assert torch.equal(found, tensor), name


def small_stage(folder: Path) -> Path:
    write_stage(folder, world_size=2, trained=trained_states(), frozen=FROZEN, buffers=BUFFERS)
    return folder


@pytest.mark.parametrize("written", [0, 1, 7, 20])
def test_an_interrupted_one_leaves_the_checkpoint_it_began_with(written: int, tmp_path: Path) -> None:
    folder = small_stage(tmp_path) / "checkpoints"
    save, count = torch.save, 0

    def interrupted(content: Any, path: Path) -> None:
        nonlocal count
        if count == written:
            path.write_bytes(b"half of a fi")
            raise KeyboardInterrupt
        count += 1
        save(content, path)

    with mock.patch.object(torch, "save", interrupted), pytest.raises(KeyboardInterrupt):
        reshard(tmp_path)
    assert list(folder.iterdir()) == [tmp_path / TAG]
    # a kill cleans nothing up
    leftover = folder / f"{TAG.name}-any"
    (leftover / "zero" / "gone.weight").mkdir(parents=True)
    assert committed_tags(folder) == [tmp_path / TAG]
    assert reshard(tmp_path) == intact_checkpoint(folder).directory == leftover
    assert not (leftover / "zero" / "gone.weight").exists()


def test_a_tensor_that_changes_on_the_way_is_named_and_nothing_kept(tmp_path: Path) -> None:
    folder = small_stage(tmp_path) / "checkpoints"
    save = torch.save

    def damaging(content: Any, path: Path) -> None:
        save(-content if path.match("head.bias/exp_avg.pt") else content, path)

    with (
        mock.patch.object(torch, "save", damaging),
        pytest.raises(CheckpointError, match=r"1 of 19 tensors .* changed .* first exp_avg:head\.bias"),
    ):
        reshard(tmp_path)
    assert list(folder.iterdir()) == [tmp_path / TAG]


def test_a_file_of_another_layout_than_torch_reckons_is_refused(tmp_path: Path) -> None:
    folder = small_stage(tmp_path) / "checkpoints"
    offsets = zero_files._record_offsets
    with (
        mock.patch.object(zero_files, "_record_offsets", lambda path: [offset + 64 for offset in offsets(path)][-1:]),
        pytest.raises(CheckpointError, match="expects a tensor at byte"),
    ):
        reshard(tmp_path)
    assert list(folder.iterdir()) == [tmp_path / TAG]


def test_a_file_that_lacks_a_part_of_the_optimizer_is_refused_rather_than_read_on(tmp_path: Path) -> None:
    folder = small_stage(tmp_path) / "checkpoints"
    whole = zero_files._flat_group
    with (
        mock.patch.object(zero_files, "_flat_group", lambda *args, **options: whole(*args, **options)[:5]),
        pytest.raises(CheckpointError, match="holds 5 elements of a group of parameters, expected at least"),
    ):
        reshard(tmp_path)
    assert list(folder.iterdir()) == [tmp_path / TAG]


def test_a_record_of_no_files_is_no_checkpoint(tmp_path: Path) -> None:
    tag = tmp_path / "checkpoints" / "step-00000001"
    tag.mkdir(parents=True)
    commit(tag, Record(step=1, identity={}, layout={"backend": "zero3", "world_size": 1}, origin={}, state={}))
    with pytest.raises(CheckpointError, match="none of them intact"):
        reshard(tmp_path)


def test_it_needs_memory_for_the_largest_tensor_and_not_for_all(tmp_path: Path) -> None:
    write_large_stage(tmp_path, megabytes=400, world_size=2)
    peak = peak_of_reshard(tmp_path)
    print(f"R18: reshard of 400 MiB with a largest tensor of {LARGEST_MIB} MiB: {peak:.0f} MiB above the imports")
    assert LARGEST_MIB < peak < LARGEST_MIB + 25
