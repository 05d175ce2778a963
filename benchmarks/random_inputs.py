"""What measurements without learning run on: conversations of random words about random images, untrained models."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet

from launch.demo.models import ModelSpec, create_model_directory

WORDS = ("which", "digit", "is", "the", "largest", "in", "top", "row", "and", "how", "many", "are", "greater", "than")


def create_models(folder: Path, specs: Mapping[str, ModelSpec]) -> None:
    """Create untrained models, whose tokenizers know the words of `write_data`, in folders of their names."""
    for seed, (name, spec) in enumerate(specs.items()):
        create_model_directory(spec, folder / name, corpus=[" ".join(WORDS)] * 4, seed=seed)


def write_data(folder: Path, *, num_samples: int, words: tuple[int, int], image_side: int = 64) -> Path:
    """Write conversations about square images, of so many words in question and answer on average."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(num_samples):
        buffer = io.BytesIO()
        pixels = rng.integers(0, 255, (image_side, image_side, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(buffer, format="PNG")
        question, answer = (
            " ".join(rng.choice(WORDS, size=int(rng.integers(count // 2, 3 * count // 2)))) for count in words
        )
        messages = [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": answer}]
        rows.append({"id": f"sample-{number:05}", "messages": messages, "images": [{"bytes": buffer.getvalue()}]})
    path = folder / "data.parquet"
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path
