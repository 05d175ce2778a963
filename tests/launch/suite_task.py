"""A task of lmms-eval about digit grids, in a folder of its own: YAML, Python and questions."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

YAML = """task: digit_grids
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: questions.parquet
test_split: test
output_type: generate_until
doc_to_visual: !function digits.images
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
process_results: !function digits.scores
generation_kwargs:
  max_new_tokens: 12
metric_list:
  - metric: characters
    aggregation: mean
    higher_is_better: true
  - metric: exact
    aggregation: mean
    higher_is_better: true
metadata:
  version: 3.0
"""
PYTHON = """
import io

import PIL.Image


def images(doc):
    return [PIL.Image.open(io.BytesIO(doc["picture"]))]


def scores(doc, results):
    return {"characters": len(results[0]), "exact": float(results[0] == doc["answer"])}
"""
JUDGED = """task: judged_grids
include: digit_grids.yaml
metric_list:
  - metric: gpt_eval_score
    aggregation: mean
"""
LIKELIHOOD = """task: likely_grids
include: digit_grids.yaml
output_type: multiple_choice
"""


def write_task(folder: Path, *, data: Path) -> None:
    """Write the task about the rows of a file of conversations with one image and one question."""
    folder.mkdir()
    rows = pq.read_table(data).to_pylist()
    questions = [
        {
            "question": row["messages"][0]["content"].replace("<image>", "").strip(),
            "answer": row["messages"][1]["content"],
            "picture": row["images"][0]["bytes"] if isinstance(row["images"][0], dict) else row["images"][0],
        }
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(questions), folder / "questions.parquet")
    (folder / "digit_grids.yaml").write_text(YAML)
    (folder / "digits.py").write_text(PYTHON)
    (folder / "judged_grids.yaml").write_text(JUDGED)
    (folder / "likely_grids.yaml").write_text(LIKELIHOOD)
