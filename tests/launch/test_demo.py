"""The whole job in its short form, through the command that a newcomer types, killed once on the way."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from launch.demo.make_models import STUDENTS
from teacher_cache import open_cache
from teacher_cache.chat import load_processor, render_prompt
from teacher_cache.config import DataConfig
from teacher_cache.documents import parse_document
from teacher_cache.samples import decode_image, read_samples
from tests.launch.conftest import DEMO_COMMAND
from tests.launch.noise import library_noise


def test_results_hold_every_accuracy(demo: Path) -> None:
    results = json.loads((demo / "results.json").read_text())
    assert 0 <= results["teacher_accuracy"] <= 1
    assert set(results["students"]) == set(STUDENTS)
    for figures in results["students"].values():
        assert all(0 <= figures[name] <= 1 for name in ("accuracy", "sft_accuracy", "untouched_accuracy"))


def test_vllm_built_the_cache_in_two_ray_actors(demo: Path) -> None:
    shards = open_cache(str(demo / "cache")).provenance["shards"]
    assert {shard["engine"] for shard in shards} == {"vllm"}
    assert len({shard["actor_id"] for shard in shards}) >= 2


def test_parameters_were_partitioned_over_both_ranks(demo: Path) -> None:
    for done in demo.glob("training/*/*/DONE.json"):
        partition = parse_document(done.read_bytes(), where=str(done))["partition"]
        assert partition["partitioned"] == partition["parameters"]
        assert partition["held"] <= partition["parameters"] * 0.51


@pytest.mark.parametrize("student", STUDENTS)
def test_students_are_plain_model_directories_that_answer(demo: Path, student: str) -> None:
    path = demo / "students" / student
    with safe_open(path / "model.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if "recalibrator" in name or "projection_teacher" in name]  # noqa: SIM118
    model = AutoModelForImageTextToText.from_pretrained(path)
    processor = load_processor(str(path))
    (sample,) = read_samples(DataConfig(path=str(demo / "data" / "test.parquet"), max_samples=1)).samples
    images = [decode_image(image, sample_id=sample.sample_id) for image in sample.images]
    inputs = processor(
        text=[render_prompt(processor, sample)], images=images, add_special_tokens=False, return_tensors="pt"
    )
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert tokens.shape[1] > inputs["input_ids"].shape[1]
    assert torch.equal(tokens[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])


def test_a_second_run_rebuilds_nothing(demo: Path) -> None:
    watched = [*demo.glob("students/*/model.safetensors"), *demo.glob("evaluation/*.json"), demo / "report.html"]
    before = {path: path.stat().st_mtime_ns for path in watched}
    again = subprocess.run([*DEMO_COMMAND, str(demo)], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    assert before == {path: path.stat().st_mtime_ns for path in watched}
    assert again.stdout == (demo / "stdout.txt").read_text()


def test_output_is_ours_alone(demo: Path) -> None:
    assert library_noise((demo / "stderr.txt").read_text()) == []
    assert "accuracy on held-out digits" in (demo / "stdout.txt").read_text()
