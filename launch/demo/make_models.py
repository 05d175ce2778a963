"""The models that a user of the real thing brings: a trained teacher, and students that are trained a little."""

import filecmp
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launch.demo.digits import FAMILIES, random_conversation, split_digits
from launch.demo.models import ModelSpec, create_model_directory

logger = logging.getLogger(__name__)

TEACHER = ModelSpec(
    family="qwen2-vl",
    tokenizer="byte-bpe",
    vocab_size=512,
    hidden_size=128,
    intermediate_size=384,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    vision_hidden=64,
    patch_size=5,
    initializer_range=0.06,
)
"""One image token per digit; 0.9 M parameters."""

INTERNVL = ModelSpec(
    family="internvl",
    tokenizer="unigram",
    vocab_size=320,
    hidden_size=96,
    intermediate_size=256,
    num_layers=2,
    num_heads=3,
    num_kv_heads=3,
    vision_hidden=64,
    patch_size=5,
    tile_size=40,
    initializer_range=0.06,
)
STUDENTS = {
    "internvl": INTERNVL,
    "llava": replace(INTERNVL, family="llava", tokenizer="metaspace-bpe", vocab_size=400, patch_size=10),
}
"""Sixteen image tokens each, another tokenizer type and vocabulary than the teacher's; about a third of its size."""

TRAINED_TEACHER = Path(__file__).parent / "teacher"
"""The teacher's directory as trained by ``train_model`` with the default plan, its weights rounded to bfloat16."""
TEACHER_STEPS = 3000


def train_model(
    spec: ModelSpec,
    path: Path,
    *,
    name: str,
    steps: int,
    vision_steps: int,
    data_seed: int,
    max_digits: int | None = None,
    half_precision: bool | None = None,
) -> None:
    """Train a model of a spec and write its Hugging Face directory; a killed call goes on where it was.

    Args:
        spec: What to train.
        path: Directory that appears when training is done.
        name: Name in progress lines.
        steps: Supervised steps.
        vision_steps: Steps of the vision encoder before them.
        data_seed: Seed of the split into training and test digits.
        max_digits: Learn from so many of the handwritten training digits; by default from all.
        half_precision: As in `SupervisedPlan`; by default where this CPU has instructions for it.
    """
    if path.exists():
        return
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from launch.demo.supervised import SupervisedPlan, has_bfloat16_instructions, train_supervised

    working = path.with_name(f".{path.name}.partial")
    if not (working / "config.json").exists():
        shutil.rmtree(working, ignore_errors=True)
        fresh = path.with_name(f".{path.name}.fresh")
        shutil.rmtree(fresh, ignore_errors=True)
        create_model_directory(spec, fresh, corpus=training_texts(seed=data_seed), seed=data_seed)
        fresh.rename(working)
    processor = AutoProcessor.from_pretrained(working)
    model = AutoModelForImageTextToText.from_pretrained(working, attn_implementation="eager")
    images, _ = split_digits(seed=data_seed)
    if max_digits is not None:
        images = replace(images, pixels=images.pixels[:max_digits], labels=images.labels[:max_digits])
    if half_precision is None:
        half_precision = has_bfloat16_instructions()
    plan = SupervisedPlan(steps=steps, vision_steps=vision_steps, seed=data_seed, half_precision=half_precision)
    checkpoint = working / "training.safetensors"
    train_supervised(model, processor=processor, images=images, plan=plan, checkpoint=checkpoint, name=name)
    # rounded once here, so that what is kept in two bytes per weight is exactly what was evaluated
    model.bfloat16().save_pretrained(working)
    checkpoint.unlink(missing_ok=True)
    working.rename(path)


def copy_trained_teacher(path: Path) -> None:
    """Copy the trained teacher that comes with the source."""
    if path.exists():
        return
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(TRAINED_TEACHER, partial)
    partial.rename(path)


def is_trained_teacher(path: Path) -> bool:
    """Return whether a directory holds the teacher that comes with the source."""
    weights = path / "model.safetensors"
    return weights.exists() and filecmp.cmp(weights, TRAINED_TEACHER / "model.safetensors", shallow=False)


def training_texts(*, seed: int) -> Sequence[str]:
    """Return questions and answers of every kind, for the tokenizers."""
    import numpy as np

    images, _ = split_digits(seed=seed)
    rng = np.random.default_rng([seed, 2])
    turns = [turn for _ in range(500) for turn in random_conversation(images, families=FAMILIES, rng=rng).turns]
    return [text for turn in turns for text in (turn.question, turn.answer)]
