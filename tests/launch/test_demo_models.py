from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from distill.evaluate import EvaluationSettings, evaluate_model
from launch.demo.digits import generate_digit_vqa, score, split_digits
from launch.demo.make_models import STUDENTS, TEACHER, TRAINED_TEACHER, copy_trained_teacher, train_model
from launch.demo.run import QUICK, make_inputs
from launch.demo.supervised import (
    CHECKPOINT_INTERVAL_STEPS,
    SupervisedPlan,
    SupervisedTrainer,
    train_supervised,
)
from teacher_cache.chat import load_processor
from teacher_cache.config import DataConfig
from teacher_cache.errors import ConfigError


def test_the_trained_teacher_answers_nine_in_ten_questions_about_unseen_digits(tmp_path: Path) -> None:
    generate_digit_vqa(tmp_path, num_train=1, num_test=280, seed=1)
    result = evaluate_model(
        TRAINED_TEACHER,
        name="teacher",
        data=DataConfig(path=str(tmp_path / "test.parquet"), max_length=256),
        settings=EvaluationSettings(batch_size=70, max_new_tokens=64),
        scorer=lambda row, answer: score(row.columns["family"], row.columns["facts"], answer),
    )
    print(f"teacher: {result.accuracy:.3f} {result.accuracy_by_family}")
    assert result.accuracy >= 0.9
    assert sum(path.stat().st_size for path in TRAINED_TEACHER.iterdir()) < 4_000_000


def test_the_trained_teacher_is_of_the_spec_that_would_be_trained(tmp_path: Path) -> None:
    copy_trained_teacher(tmp_path / "teacher")
    train_model(TEACHER, tmp_path / "fresh", name="fresh", steps=1, vision_steps=1, data_seed=1)
    shapes = [
        {name: tuple(p.shape) for name, p in AutoModelForImageTextToText.from_pretrained(path).named_parameters()}
        for path in (tmp_path / "teacher", tmp_path / "fresh")
    ]
    assert shapes[0] == shapes[1]
    vocabularies = [load_processor(str(path)).tokenizer.get_vocab() for path in (TRAINED_TEACHER, tmp_path / "fresh")]
    assert vocabularies[0] == vocabularies[1]


def test_a_folder_with_the_teacher_from_the_source_trains_no_other(tmp_path: Path) -> None:
    generate_digit_vqa(tmp_path / "data", num_train=1, num_test=1, seed=1)
    copy_trained_teacher(tmp_path / "teacher")
    with pytest.raises(ConfigError, match="in another folder"):
        make_inputs(tmp_path, size=QUICK, train_teacher=True)


@pytest.mark.parametrize("student", ["llava", pytest.param("internvl", marks=pytest.mark.slow)])
def test_supervised_training_lowers_the_loss(student: str, tmp_path: Path) -> None:
    train_model(STUDENTS[student], tmp_path / student, name=student, steps=1, vision_steps=0, data_seed=1)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / student, dtype=torch.float32)
    losses = train_supervised(
        model,
        processor=load_processor(str(tmp_path / student)),
        images=split_digits(seed=1)[0],
        plan=SupervisedPlan(steps=24, vision_steps=8, batch_size=16, warmup_steps=4, seed=5, half_precision=False),
        checkpoint=tmp_path / "checkpoint.safetensors",
        name=student,
    )
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


def test_a_run_continued_from_its_checkpoint_gives_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.demo.supervised.CHECKPOINT_INTERVAL_STEPS", 8)
    assert CHECKPOINT_INTERVAL_STEPS % 8 == 0
    train_model(STUDENTS["llava"], tmp_path / "base", name="base", steps=1, vision_steps=0, data_seed=1)
    processor = load_processor(str(tmp_path / "base"))
    images, _ = split_digits(seed=1)
    plan = SupervisedPlan(steps=16, vision_steps=2, batch_size=4, seed=5, half_precision=True)

    def run(checkpoint: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype=torch.float32)
        options = {"processor": processor, "images": images, "plan": plan, "checkpoint": checkpoint, "name": "m"}
        losses = train_supervised(model, **options)  # type: ignore[arg-type]
        return losses, model.state_dict()

    unbroken_losses, unbroken = run(tmp_path / "unbroken.safetensors")

    class Killed(Exception):
        pass

    original = SupervisedTrainer.step

    def step(self: SupervisedTrainer, batch: object, *, encoder: object, step: int) -> float:
        if step == 11:
            raise Killed
        return original(self, batch, encoder=encoder, step=step)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(SupervisedTrainer, "step", step)
        with pytest.raises(Killed):
            run(tmp_path / "killed.safetensors")
    losses, weights = run(tmp_path / "killed.safetensors")
    assert losses == unbroken_losses[8:]
    for name, tensor in unbroken.items():
        assert torch.equal(tensor, weights[name]), name
