"""Score answers and keep the result of one evaluation. Imports neither torch nor transformers."""

import math
import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import ValidationError

from teacher_cache.config import DataConfig, StrictConfig
from teacher_cache.errors import DataError, SampleError
from teacher_cache.samples import parse_row, read_rows
from teacher_cache.schema import Sample


@dataclass(frozen=True, kw_only=True)
class SampleRow:
    """What a scorer sees of a sample: never its images."""

    sample_id: str
    reference: str
    """Text of the last assistant turn."""
    columns: Mapping[str, Any]
    """The further columns of the data row, such as ``family`` or ``facts``."""


Scorer = Callable[[SampleRow, str], float]
"""Takes a row and an answer, returns a score from 0 (wrong) to 1 (right)."""


class EvaluationResult(StrictConfig):
    """What one model made of held-out data."""

    name: str
    """Name of the model in reports."""
    num_samples: int
    """Samples that were answered."""
    accuracy: float
    """Mean score, 0 to 1."""
    accuracy_by_family: dict[str, float]
    """Mean score per value of the ``family`` column; empty without that column."""
    bits_per_byte: float
    """Bits that the model needs per UTF-8 byte of the reference answers, end-of-turn tokens included."""
    teacher_agreement: float | None
    """Fraction of the samples whose normalised answer equals the teacher's; null where no teacher was given."""
    answers: dict[str, str]
    """Answer per sample id, without special tokens."""
    scores: dict[str, float]
    """Score per sample id."""


def read_sample_rows(data: DataConfig, *, samples: Sequence[Sample]) -> list[SampleRow]:
    """Return the reference answer and the further columns of each sample, in their order."""
    columns: dict[str, dict[str, Any]] = {}
    path = Path(data.path)
    image_root = Path(data.image_root) if data.image_root else path.parent
    for place, row in read_rows(path):
        try:
            sample_id = parse_row(row, place=place, image_root=image_root).sample_id
        except SampleError:  # counted and listed by read_samples
            continue
        extra = {key: value for key, value in row.items() if key not in ("id", "messages", "images")}
        columns.setdefault(sample_id, extra)
    return [
        SampleRow(sample_id=sample.sample_id, reference=reference_answer(sample), columns=columns[sample.sample_id])
        for sample in samples
    ]


def reference_answer(sample: Sample) -> str:
    """Return the text of the last assistant turn, without thinking."""
    return next(message.answer for message in reversed(sample.messages) if message.role == "assistant")


def normalize_answer(text: str) -> str:
    """Return the text in one case and Unicode form, without surrounding punctuation and repeated white space."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"\s+", " ", folded).strip(" .,;:!?\"'")


def exact_match(row: SampleRow, answer: str) -> float:
    """Score 1 where the normalised answer equals the normalised reference, else 0."""
    return float(normalize_answer(answer) == normalize_answer(row.reference))


def agreement(answers: Mapping[str, str], *, teacher_answers: Mapping[str, str]) -> float:
    """Return the fraction of ``answers`` whose normalised text equals the teacher's.

    Raises:
        DataError: The teacher has no answer for a sample.
    """
    missing = sorted(answers.keys() - teacher_answers.keys())
    if missing:
        raise DataError(
            f"the teacher's answers lack {len(missing)} sample(s), such as {missing[0]}: evaluate it on the same data"
        )
    return fmean(normalize_answer(text) == normalize_answer(teacher_answers[key]) for key, text in answers.items())


def bits_per_byte_of(nats: float, *, num_bytes: int) -> float:
    """Return the bits per byte that nats over so many UTF-8 bytes of answer text are."""
    return nats / math.log(2) / num_bytes


def accuracy_by_family(rows: Sequence[SampleRow], *, scores: Mapping[str, float]) -> dict[str, float]:
    """Return the mean score per value of the ``family`` column, in alphabetical order."""
    families: dict[str, list[float]] = {}
    for row in rows:
        if (family := row.columns.get("family")) is not None:
            families.setdefault(str(family), []).append(scores[row.sample_id])
    return {family: fmean(families[family]) for family in sorted(families)}


def write_result(result: EvaluationResult, path: Path) -> None:
    """Write a result as JSON: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(result.model_dump_json(indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_result(path: Path) -> EvaluationResult:
    """Read what ``write_result`` wrote.

    Raises:
        DataError: The file is missing or holds something else.
    """
    try:
        return EvaluationResult.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise DataError(f"{path} is no evaluation result: {error}") from error
