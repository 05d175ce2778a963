"""A small data file and its teacher cache, built in this process with the reference teacher."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from teacher_cache.build_plan import plan_shards
from teacher_cache.chat import encode_conversation, load_processor
from teacher_cache.config import BuildConfig, CacheConfig, DataConfig, TargetsConfig, TeacherConfig
from teacher_cache.samples import read_samples
from teacher_cache.teacher import TransformersTeacher, compute_targets, load_teacher_head
from teacher_cache.writer import create_or_open_builder

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write_data(
    folder: Path,
    *,
    num_samples: int,
    text_only: Sequence[int] = (),
    multi_turn: Sequence[int] = (),
    image_sizes: Sequence[tuple[int, int]] = ((16, 16),),
) -> Path:
    """Write a JSON-lines file of questions about small images; some rows without one, some with two turns.

    Sizes are width and height; the rows take them in turn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    lines = []
    for index in range(num_samples):
        mark = "" if index in text_only else "<image>"
        messages = [
            {"role": "user", "content": f"{mark}Which digit is in the top row, {WORDS[index % 7]}?"},
            {"role": "assistant", "content": f"The digit {WORDS[index % 10]} occurs."},
        ]
        if index in multi_turn:
            messages += [
                {"role": "user", "content": "What is the sum?"},
                {"role": "assistant", "content": f"The sum is {WORDS[index % 9]}."},
            ]
        images = []
        if index not in text_only:
            path = folder / f"{index}.png"
            width, height = image_sizes[index % len(image_sizes)]
            pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, format="PNG")
            path.write_bytes(buffer.getvalue())
            images = [path.name]
        lines.append(json.dumps({"id": f"s{index:03d}", "messages": messages, "images": images}))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def build_small_cache(
    folder: Path, *, teacher: Path, data: Path, without_question_rows: Sequence[str] = ()
) -> CacheConfig:
    """Build a cache of one shard and return its configuration."""
    config = CacheConfig(
        uri=str(folder / "cache"),
        teacher=TeacherConfig(model=str(teacher), dtype="float32"),
        data=DataConfig(path=str(data), max_length=512),
        targets=TargetsConfig(topk=8),
        build=BuildConfig(engine="transformers"),
    )
    samples = read_samples(config.data).samples
    processor = load_processor(str(teacher))
    encoded = [encode_conversation(processor, sample, max_length=512) for sample in samples]
    engine = TransformersTeacher(config.teacher)
    wanted = [sample.sample_id not in without_question_rows for sample in samples]
    targets = compute_targets(engine, encoded, topk=config.targets.topk, question_rows=wanted)
    plan = plan_shards(samples, samples_per_shard=len(samples))
    writer = create_or_open_builder(
        config.uri, identity={"test": "small"}, plan=plan, provenance={}, head=load_teacher_head(config.teacher)
    )
    writer.commit_shard(
        plan[0].shard_id,
        targets,
        sample_digests={sample.sample_id: sample.digest for sample in samples},
        skipped=[],
        provenance={},
    )
    return config
