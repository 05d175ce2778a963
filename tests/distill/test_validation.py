"""Scores on held-out data during training: what they are, when they are made, and that they change nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.checkpoint import discard_tag
from distill.config import Method, Stage, ValidationConfig
from distill.evaluate import EvaluationSettings, evaluate_model
from distill.processes import Processes
from distill.trainer import train_student
from distill.validation import ACCURACY_METRIC, BITS_METRIC, Validation, _share
from teacher_cache.config import CacheConfig, DataConfig
from teacher_cache.errors import DataError
from tests.distill.held_out import NEW_TOKENS, NUM_SAMPLES, RIGHT, write_held_out
from tests.distill.small_cache import build_small_cache, write_data
from tests.distill.small_runs import STAGE, numbers, read_metrics, student_config, train_config

LAST = 4
METHODS: dict[Method, tuple[Stage, ...]] = {"sft": ("distill",), "genrecal": ("align", "distill")}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2_vl: Path) -> CacheConfig:
    folder = tmp_path_factory.mktemp("validation")
    return build_small_cache(folder, teacher=tiny_qwen2_vl, data=write_data(folder / "data", num_samples=8))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory, tiny_llava: Path) -> Path:
    return write_held_out(tmp_path_factory.mktemp("held-out"), student=tiny_llava)


def validation_settings(held_out: Path) -> dict[str, Any]:
    return {
        "data": str(held_out),
        "interval_steps": 3,
        "batch_size": 2,
        "generate": True,
        "max_new_tokens": NEW_TOKENS,
    }


def train(cache: CacheConfig, student: Path, output_dir: Path, *, held_out: Path | None, **changes: Any) -> None:
    settings = {"validation": validation_settings(held_out)} if held_out else {}
    train_student(
        cache=cache,
        student=student_config(student, method="sft"),
        train=train_config(distill=STAGE | {"max_steps": LAST}, **settings, **changes),
        output_dir=output_dir,
        stages=["distill"],
    )


@pytest.fixture(scope="module")
def whole(cache: CacheConfig, tiny_llava: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(cache, tiny_llava, folder, held_out=held_out)
    return folder


def scores(output_dir: Path) -> dict[int, tuple[float, float]]:
    records = [record for record in read_metrics(output_dir, "distill") if BITS_METRIC in record]
    assert len(records) == len({record["global_step"] for record in records})
    return {record["global_step"]: (record[BITS_METRIC], record[ACCURACY_METRIC]) for record in records}


def test_scores_are_those_of_the_evaluation_of_the_same_student(whole: Path, held_out: Path, tiny_llava: Path) -> None:
    measured = scores(whole)
    assert list(measured) == [0, 3, LAST]
    settings = EvaluationSettings(batch_size=3, max_new_tokens=NEW_TOKENS)
    exported = whole / "training" / "tiny" / "distill" / "export"
    for step, model in {0: tiny_llava, LAST: exported}.items():
        result = evaluate_model(model, name="x", data=DataConfig(path=str(held_out)), settings=settings)
        assert measured[step] == pytest.approx((result.bits_per_byte, result.accuracy), rel=1e-5)
    assert measured[0][1] == len(RIGHT) / NUM_SAMPLES
    assert measured[LAST][0] != measured[0][0]


def test_training_is_the_same_without_it(whole: Path, cache: CacheConfig, tiny_llava: Path, tmp_path: Path) -> None:
    train(cache, tiny_llava, tmp_path, held_out=None)
    plain, scored = (numbers(read_metrics(folder, "distill")) for folder in (tmp_path, whole))
    assert plain == [record for record in scored if record["global_step"] > 0]
    name = "training/tiny/distill/export/model.safetensors"
    assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_two_zero3_processes_give_the_same_scores_and_train_as_without(
    whole: Path, cache: CacheConfig, tiny_llava: Path, held_out: Path, tmp_path: Path
) -> None:
    """Five samples in batches of two: one process repeats a batch, one batch has no image."""
    inputs = {
        "cache": cache.model_dump(mode="json"),
        "student": student_config(tiny_llava, method="sft").model_dump(mode="json"),
        "held_out": str(held_out),
    }
    (tmp_path / "inputs.json").write_text(json.dumps(inputs))
    script = Path(__file__).with_name("validation_scenarios.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(script.parents[2]), "PYTHONWARNINGS": "ignore::FutureWarning"}
    finished = subprocess.run(
        [*command, str(script), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]
    one, two = scores(whole), scores(tmp_path / "sft" / "scored")
    assert two[0] == one[0]
    assert list(two) == list(one)
    assert two[LAST] == pytest.approx(one[LAST], rel=1e-5)
    for method in METHODS:
        folders = (tmp_path / method / name for name in ("plain", "scored"))
        plain, scored = (numbers(read_metrics(folder, "distill")) for folder in folders)
        assert plain == [record for record in scored if record["global_step"] > 0]
    assert scores(tmp_path / "genrecal" / "scored")[0] == one[0]
    assert not any(BITS_METRIC in record for record in read_metrics(tmp_path / "genrecal" / "scored", "align"))


def test_a_resume_repeats_no_scores_and_makes_those_that_a_stop_left_out(
    whole: Path, cache: CacheConfig, tiny_llava: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import distill.loop

    steps: list[str] = []
    take_step, validate = distill.loop.take_step, distill.loop.validate

    def stopping(*arguments: Any, step: int, **rest: Any) -> Any:
        if step == 3:
            raise InterruptedError
        return take_step(*arguments, step=step, **rest)

    def counting(*arguments: Any, label: str, **rest: Any) -> Any:
        steps.append(label)
        return validate(*arguments, label=label, **rest)

    monkeypatch.setattr(distill.loop, "validate", counting)
    monkeypatch.setattr(distill.loop, "take_step", stopping)
    with pytest.raises(InterruptedError):
        train(cache, tiny_llava, tmp_path, held_out=held_out, save_interval_steps=3)
    monkeypatch.setattr(distill.loop, "take_step", take_step)
    metrics = tmp_path / "training/tiny/distill/metrics.jsonl"
    logged = metrics.read_text()
    train(cache, tiny_llava, tmp_path, held_out=held_out, save_interval_steps=3)
    assert steps == [f"tiny distill step {step}" for step in (0, 3, LAST)]
    assert scores(tmp_path) == scores(whole)
    assert numbers(read_metrics(tmp_path, "distill")) == numbers(read_metrics(whole, "distill"))

    # as if a signal had come before the scores of step 3
    kept = [line for line in logged.splitlines() if '"global_step": 3' not in line]
    metrics.write_text("".join(f"{line}\n" for line in kept))
    (metrics.parent / "DONE.json").unlink()
    discard_tag(metrics.parent / f"checkpoints/step-{LAST:08d}")
    train(cache, tiny_llava, tmp_path, held_out=held_out, save_interval_steps=3)
    assert steps[3:] == [f"tiny distill step {step}" for step in (3, LAST)]
    assert scores(tmp_path) == scores(whole)


def test_every_process_makes_as_many_calls_and_each_batch_counts_once() -> None:
    import torch

    for world_size in (1, 2, 3, 7):
        shares = [
            _share(
                [[], [], [], [], []], processes=Processes(rank=rank, world_size=world_size, device=torch.device("cpu"))
            )
            for rank in range(world_size)
        ]
        assert len({len(share) for share in shares}) == 1
        assert sorted(index for share in shares for index, _ in share if index is not None) == [0, 1, 2, 3, 4]


def test_scores_are_due_at_both_ends_and_at_each_interval() -> None:
    config = ValidationConfig(data="x", interval_steps=4)
    validation = Validation(config=config, samples=(), processor=None, max_length=1)
    assert [step for step in range(11) if validation.is_due(step, max_steps=10)] == [0, 4, 8, 10]


def test_a_sample_that_is_too_long_is_named(
    cache: CacheConfig, tiny_llava: Path, held_out: Path, tmp_path: Path
) -> None:
    text = held_out.read_text().replace("Which digit", "Which digit " * 200, 1)
    long = held_out.with_name("long.jsonl")
    long.write_text(text)
    with pytest.raises(DataError, match=r"held-out sample s000 of .*637 tokens"):
        train(cache, tiny_llava, tmp_path, held_out=long)
