"""results.json: every student beside the baselines that were trained as it was."""

import os
from pathlib import Path
from typing import Any
from unittest import mock

from distill.scoring import EvaluationResult, write_result
from launch import pipeline
from launch.results import collect_results
from launch.run_config import RunConfig


def run_config(folder: Path, *students: dict[str, Any], **values: Any) -> RunConfig:
    cache = {"uri": "c", "teacher": {"model": "t"}, "data": {"path": str(folder / "data.parquet")}}
    return RunConfig.model_validate({"output_dir": str(folder), "cache": cache, "students": list(students)} | values)


def score(folder: Path, **accuracies: float) -> None:
    (folder / "evaluation").mkdir(exist_ok=True)
    for name, accuracy in accuracies.items():
        result = EvaluationResult(
            name=name.replace("_", "-"),
            num_samples=1,
            accuracy=accuracy,
            accuracy_by_family={},
            bits_per_byte=1.0,
            teacher_agreement=None,
            answers={},
            scores={},
        )
        write_result(result, folder / "evaluation" / f"{result.name}.json")


SMALL, SFT = {"name": "small", "model": "m"}, {"name": "small-sft", "model": "m", "method": "sft"}


def test_a_baseline_of_the_same_settings_is_compared(tmp_path: Path) -> None:
    config = run_config(tmp_path, SMALL, SFT, matrix={"seed": [0, 1]})
    score(tmp_path, small_seed_0=0.7, small_seed_1=0.6, small_sft_seed_0=0.72, small_sft_seed_1=0.5)
    students = collect_results(config)["students"]
    assert {name: values["sft_accuracy"] for name, values in students.items()} == {
        "small-seed-0": 0.72,
        "small-seed-1": 0.5,
    }


def test_the_only_baseline_serves_students_of_other_settings_and_of_several_none_does(tmp_path: Path) -> None:
    own = SMALL | {"train": {"seed": 7}}
    score(tmp_path, small=0.7, small_sft=0.6, small_sft_b=0.5)
    assert collect_results(run_config(tmp_path, own, SFT))["students"]["small"]["sft_accuracy"] == 0.6
    two = run_config(tmp_path, own, SFT | {"train": {"seed": 1}}, SFT | {"name": "small-sft-b", "train": {"seed": 2}})
    assert "sft_accuracy" not in collect_results(two)["students"]["small"]


def test_a_finished_training_is_looked_at_again_after_a_change(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (model / name).write_text("{}")
    (tmp_path / "data.parquet").write_text("rows")
    student = {"name": "small", "model": str(model)}

    def key(**data: Any) -> str:
        config = run_config(tmp_path, student)
        values = config.cache.data.model_dump() | data
        cache = config.cache.model_copy(update={"data": type(config.cache.data).model_validate(values)})
        config = config.model_copy(update={"cache": cache})
        with mock.patch("teacher_cache.open_cache", return_value=mock.Mock(fingerprint="cache")):
            return pipeline._training_key(config, config.students[0])

    first = key()
    assert key() == first
    assert key(max_samples=2) != first
    os.utime(tmp_path / "data.parquet", ns=(0, 0))
    second = key()
    assert second != first
    (model / "tokenizer.json").write_text('{"other": 1}')
    assert key() not in (first, second)
