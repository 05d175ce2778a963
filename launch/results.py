"""What a run evaluates under which name, and results.json made of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.config import StudentConfig
from distill.scoring import EvaluationResult, read_result
from launch.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One model of a run and the name of its evaluation."""

    name: str
    path: Path
    trained: bool
    """True for a student that this run trains, so that it may not exist yet."""


def evaluated_models(config: RunConfig) -> list[Evaluated]:
    """Return the teacher first (agreement is measured against it), then each student before and after training."""
    models = [Evaluated(name="teacher", path=Path(config.cache.teacher.model), trained=False)]
    for student in config.students:
        if student.method == "genrecal":
            models.append(Evaluated(name=f"{student.name}-untouched", path=Path(student.model), trained=False))
        trained = Path(config.output_dir) / "students" / student.name
        models.append(Evaluated(name=student.name, path=trained, trained=True))
    return models


def collect_results(config: RunConfig) -> dict[str, Any]:
    """Write results.json from the evaluations at hand; students of other run files in the same folder stay in it."""
    folder = Path(config.output_dir)
    path = folder / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"students": {}}
    teacher = read_result(folder / "evaluation" / "teacher.json")
    results |= {
        "teacher_accuracy": teacher.accuracy,
        "teacher_bits_per_byte": teacher.bits_per_byte,
        "num_samples": teacher.num_samples,
    }
    for student in config.students:
        if student.method == "genrecal":
            results["students"][student.name] = _student_results(student, config=config)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=2) + "\n")
    temporary.replace(path)
    return results


def _student_results(student: StudentConfig, *, config: RunConfig) -> dict[str, Any]:
    folder = Path(config.output_dir) / "evaluation"
    baselines = {other.method: other.name for other in config.students if other.model == student.model}
    names = {"": student.name, "untouched_": f"{student.name}-untouched"}
    names |= {f"{method}_": name for method, name in baselines.items() if method != "genrecal"}
    values: dict[str, Any] = {}
    for prefix, name in names.items():
        if (file := folder / f"{name}.json").exists():
            values |= _figures(read_result(file), prefix=prefix)
    return values


def _figures(result: EvaluationResult, *, prefix: str) -> dict[str, Any]:
    return {
        f"{prefix}accuracy": result.accuracy,
        f"{prefix}bits_per_byte": result.bits_per_byte,
        f"{prefix}teacher_agreement": result.teacher_agreement,
    }
