"""What a study found: one row per arm, seed and pair, kept per run and together in one Parquet file."""

import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from teacher_cache.durable_files import sync_folder

RESULT = "result.json"
"""Written last: a run's folder that has it is done."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One trained, or untouched, student, or a teacher; FLOPs are model FLOPs, of forward and backward passes."""

    arm: str
    accuracy: float
    bits_per_byte: float
    calibration_error: float
    confidence_when_wrong: float | None = None
    teacher_agreement: float | None = None
    teacher_divergence: float | None = None
    """Jensen-Shannon divergence from the teacher's next-byte distributions, in nats."""
    seed: int | None = None
    student: str | None = None
    teacher: str | None = None
    """None where no teacher decides the result; agreement and divergence are then those with the study's first."""
    student_flops: float = 0.0
    """Training, Recalibrator and the reading of the teacher's head included."""
    capture_flops: float = 0.0
    """The teacher's forward pass over the samples that were used."""
    total_flops: float = 0.0
    """Of the student, and its share of the capture: as many students as the study trains from the teacher share it."""
    cache_bytes: int = 0
    """Of the tiers and samples that were read."""
    seconds: float = 0.0
    """Of the optimizer steps."""
    align_question_gap: float | None = None
    align_boundary_gap: float | None = None
    align_rest_gap: float | None = None
    distill_question_gap: float | None = None
    distill_boundary_gap: float | None = None
    distill_rest_gap: float | None = None
    versions: str = "{}"
    config_digest: str = ""
    folder: str = ""
    """Of the run, below the study's output_dir."""


SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("arm", "student", "teacher")),
        ("seed", pa.int64()),
        *(
            (name, pa.float64())
            for name in (
                "accuracy",
                "bits_per_byte",
                "student_flops",
                "capture_flops",
                "total_flops",
                "seconds",
                "teacher_agreement",
                "teacher_divergence",
                "calibration_error",
                "confidence_when_wrong",
            )
        ),
        ("cache_bytes", pa.int64()),
        *(
            (f"{stage}_{gap}_gap", pa.float64())
            for stage in ("align", "distill")
            for gap in ("question", "boundary", "rest")
        ),
        *((name, pa.string()) for name in ("versions", "config_digest", "folder")),
    ]
)


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write the rows of one run durably: they are there whole, or not at all."""
    _write_durably(path, (json.dumps([asdict(row) for row in rows], indent=2) + "\n").encode())


def read_rows(path: Path) -> list[Row]:
    """Read what ``write_rows`` wrote."""
    return [Row(**values) for values in json.loads(path.read_text())]


def write_table(rows: Iterable[Row], path: Path) -> None:
    """Write all rows durably as one Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA), buffer)
    _write_durably(path, buffer.getvalue())


def read_table(path: Path) -> list[Row]:
    """Read what ``write_table`` wrote; nothing before the first run."""
    if not path.exists():
        return []
    return [Row(**values) for values in pq.read_table(path).to_pylist()]


def _write_durably(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)
