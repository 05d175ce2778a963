"""What a run evaluates under which name, and results.json made of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.config import StudentConfig
from distill.scoring import EvaluationResult, read_result
from launch.run_config import RunConfig
from launch.run_students import RunStudent
from teacher_cache.config import TeacherConfig
from teacher_cache.durable_files import replace_file


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One model of a run and the name of its evaluation."""

    name: str
    model: str
    """Hugging Face directory or repository id."""
    revision: str | None = None
    trust_remote_code: bool = False
    trained: bool
    """True for a student that this run trains, so that it may not exist yet."""


def evaluated_models(config: RunConfig) -> list[Evaluated]:
    """Return the teacher first (agreement is measured against it), then each student before and after training."""
    models = []
    if config.evaluation is not None and config.evaluation.score_teacher:
        models.append(_as_given("teacher", config.cache.teacher))
    for student in config.students:
        if student.method == "genrecal":
            models.append(_as_given(f"{student.name}-untouched", student))
        trained = Path(config.output_dir) / "students" / student.name
        models.append(Evaluated(name=student.name, model=str(trained), trained=True))
    return models


def _as_given(name: str, config: TeacherConfig | StudentConfig) -> Evaluated:
    return Evaluated(
        name=name,
        model=config.model,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        trained=False,
    )


def collect_results(config: RunConfig) -> dict[str, Any]:
    """Write results.json from the evaluations at hand; students of other run files in the same folder stay in it."""
    folder = Path(config.output_dir)
    path = folder / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"students": {}}
    if (teacher_file := folder / "evaluation" / "teacher.json").exists():
        teacher = read_result(teacher_file)
        results |= {"teacher_accuracy": teacher.accuracy, "teacher_bits_per_byte": teacher.bits_per_byte}
        results |= {"num_samples": teacher.num_samples}
    for student in config.students:
        if student.method == "genrecal":
            results["students"][student.name] = _student_results(student, config=config)
    data = (json.dumps(results, indent=2) + "\n").encode()
    if not path.exists() or path.read_bytes() != data:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
    return results


def _student_results(student: RunStudent, *, config: RunConfig) -> dict[str, Any]:
    folder = Path(config.output_dir) / "evaluation"
    names = {"": student.name, "untouched_": f"{student.name}-untouched"} | _baselines(student, config=config)
    values: dict[str, Any] = {}
    for prefix, name in names.items():
        if (file := folder / f"{name}.json").exists():
            values |= _figures(read_result(file), prefix=prefix)
    return values


def _baselines(student: RunStudent, *, config: RunConfig) -> dict[str, str]:
    """Return the baselines of a student: of the same model and settings, or else the only one of the same model."""
    names = {}
    for method in ("sft", "kd", "uld"):
        of_model = [other for other in config.students if (other.model, other.method) == (student.model, method)]
        alike = [other for other in of_model if other.train == student.train] or of_model
        if len(alike) == 1:
            names[f"{method}_"] = alike[0].name
    return names


def _figures(result: EvaluationResult, *, prefix: str) -> dict[str, Any]:
    return {
        f"{prefix}accuracy": result.accuracy,
        f"{prefix}bits_per_byte": result.bits_per_byte,
        f"{prefix}teacher_agreement": result.teacher_agreement,
    }
