"""The student of a checkpoint in the middle of a stage, taken out without a launcher."""

from pathlib import Path
from unittest import mock

import pytest

from distill import loop
from distill.checkpoint import Record, save_checkpoint
from distill.engine import Engine
from distill.export import export_student
from distill.processes import Processes
from distill.trainer import train_student
from launch.cli import main
from tests.distill.small_cache import build_small_cache, write_data
from tests.distill.small_runs import student_config, train_config


def test_a_checkpoint_exports_what_the_trainer_would_have(
    tiny_qwen2_vl: Path, tiny_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data", num_samples=13)
    cache = build_small_cache(tmp_path, teacher=tiny_qwen2_vl, data=data)

    def exporting(engine: Engine, directory: Path, *, record: Record, processes: Processes, keep: int) -> None:
        save_checkpoint(engine, directory, record=record, processes=processes, keep=keep)
        target = tmp_path / f"step-{record.step:08d}"
        export_student(engine, target, source=tiny_llava, dtype="float32", processes=processes)

    with mock.patch.object(loop, "save_checkpoint", exporting):
        student = student_config(tiny_llava, method="sft")
        train_student(cache=cache, student=student, train=train_config(), output_dir=tmp_path, stages=["distill"])
    stage = tmp_path / "training" / "tiny" / "distill"
    (stage / "export").rename(stage / "as-if-it-were-not-done")
    for source, step in (("checkpoints/step-00000002", 2), (".", 3)):
        target = tmp_path / f"out-{step}"
        assert main(["export", str(stage / source), str(target)]) == 0
        expected = {file.name: file.read_bytes() for file in (tmp_path / f"step-{step:08d}").iterdir()}
        assert {file.name: file.read_bytes() for file in target.iterdir()} == expected
    assert (tmp_path / "out-2/model.safetensors").read_bytes() != (tmp_path / "out-3/model.safetensors").read_bytes()
    newest = stage / "checkpoints" / "step-00000003"
    (newest / "state.pt").write_bytes(b"")
    assert main(["export", str(newest), str(tmp_path / "damaged")]) == 4
    assert "first state.pt" in capsys.readouterr().err
    assert main(["export", str(stage), str(tmp_path / "one-before")]) == 0
    assert (tmp_path / "one-before/model.safetensors").read_bytes() == (
        tmp_path / "out-2/model.safetensors"
    ).read_bytes()
