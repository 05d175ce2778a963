"""Held-out data of which a student answers some right before it is trained, so that its accuracy says something."""

import json
from pathlib import Path

from distill.evaluate import EvaluationSettings, generate_answers, load_chat_model
from teacher_cache.config import DataConfig
from teacher_cache.samples import read_samples
from tests.distill.small_cache import write_data

NEW_TOKENS = 6
RIGHT = (0, 2, 3)
NUM_SAMPLES = 5


def write_held_out(folder: Path, *, student: Path) -> Path:
    """Write five conversations, one without an image; the answers to three are what the student generates."""
    path = write_data(folder, num_samples=NUM_SAMPLES, text_only=(1,))
    settings = EvaluationSettings(batch_size=1, max_new_tokens=NEW_TOKENS)
    samples = read_samples(DataConfig(path=str(path))).samples
    answers = generate_answers(load_chat_model(student, settings=settings), samples=samples, settings=settings)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for index in RIGHT:
        rows[index]["messages"][-1]["content"] = answers[rows[index]["id"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
