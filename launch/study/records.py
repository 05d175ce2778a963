"""What is kept of scored models and of runs. Imports neither torch nor transformers."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from distill.config import Stage
from teacher_cache.durable_files import remove

STUDENT = "student"
"""Name of every run's student within its folder."""
GAPS = ("question", "boundary", "rest")

Places = dict[tuple[str, int, int], Float[np.ndarray, " classes"]]
"""Distribution over the next byte by sample, turn and byte of its answer."""


@dataclass(frozen=True, kw_only=True)
class TeacherScores:
    """What a teacher says about the held-out questions."""

    answers: dict[str, str]
    places: Places


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Figures of one model; those against a teacher are None without one."""

    accuracy: float
    bits_per_byte: float
    calibration_error: float
    confidence_when_wrong: float | None
    teacher_agreement: float | None = None
    teacher_divergence: float | None = None
    """Jensen-Shannon divergence of next-byte distributions, mean over places, in nats."""


def save_teacher(scores: Scores, own: TeacherScores, path: Path) -> None:
    """Keep a teacher's figures and its side of the comparison."""
    keys = list(own.places)
    about = {"scores": asdict(scores), "answers": own.answers, "places": keys}
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, about=np.array(json.dumps(about)), distributions=np.stack([own.places[key] for key in keys]))
    partial.replace(path)


def load_teacher(path: Path) -> tuple[Scores, TeacherScores]:
    """Read what ``save_teacher`` wrote."""
    with np.load(path) as kept:
        about, distributions = json.loads(str(kept["about"])), kept["distributions"]
    keys = [(sample_id, turn, byte) for sample_id, turn, byte in about["places"]]
    own = TeacherScores(answers=about["answers"], places=dict(zip(keys, distributions, strict=True)))
    return Scores(**about["scores"]), own


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What training took, from its metrics."""

    flops: float
    seconds: float
    gaps: dict[str, float]


def read_spent(folder: Path, stages: Iterable[Stage]) -> Spent:
    """Add up what the stages logged; gaps are those of each stage's last measurement."""
    flops = seconds = 0.0
    gaps: dict[str, float] = {}
    for stage in stages:
        for record in metrics(folder, stage):
            step_s = record.get("time/step_s", 0.0)
            flops += record.get("throughput/tflops_per_s", 0.0) * 1e12 * step_s
            seconds += step_s
            for gap in GAPS:
                if (value := record.get(f"train/{gap}_shuffle_gap")) is not None:
                    gaps[f"{stage}_{gap}_gap"] = value
    return Spent(flops=flops, seconds=seconds, gaps=gaps)


def metrics(folder: Path, stage: Stage) -> Iterator[dict[str, Any]]:
    """Yield the records of one stage of a run."""
    path = folder / "training" / STUDENT / stage / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        yield json.loads(line)


def throw_away_weights(folder: Path) -> None:
    """Remove what a run trained, which its rows no longer need; a killed call may have left it."""
    remove(folder / "students")
    for pattern in ("checkpoints", "export", "recalibrator.safetensors"):
        for path in folder.glob(f"training/*/*/{pattern}"):
            remove(path)
