"""Tables and figures of the report about what the models answer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from distill.scoring import EvaluationResult
from launch.report.data import BASELINES, RunData
from launch.report.figures import KIND_LABELS, accuracy_figure

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class HeadlineRow:
    """One model in the headline table; None where the run has no such figure."""

    model: str
    kind: str
    label: str
    accuracy: float | None
    margin: float | None
    bits_per_byte: float | None
    agreement: float | None
    opens_group: bool


def summary_sentences(run: RunData) -> list[str]:
    """Return the findings in a few sentences, each number from the run's files."""
    accuracy = {(row.model, row.kind): row.accuracy for row in headline_rows(run)}
    sentences = []
    if (teacher := accuracy.get(("teacher", "teacher"))) is not None:
        sentences.append(f"The teacher scores {_percent(teacher)} on held-out data.")
    for student in run.students:
        steps = [(kind, accuracy.get((student, kind))) for kind in (*BASELINES, "distilled")]
        told = [f"{KIND_LABELS[kind]} {_percent(value)}" for kind, value in steps if value is not None]
        if told:
            sentences.append(f"{student}: {', '.join(told)}.")
    return sentences


def headline_rows(run: RunData) -> list[HeadlineRow]:
    """Return the teacher's row, then each student's: untouched, baselines, distilled."""
    rows = [_headline_row(run, "teacher", kind="teacher", label="ceiling", prefix="teacher_", values=run.results)]
    for student in run.students:
        values = run.results["students"].get(student, {})
        for kind in (*BASELINES, "distilled"):
            prefix = "" if kind == "distilled" else f"{kind}_"
            rows.append(_headline_row(run, student, kind=kind, label=KIND_LABELS[kind], prefix=prefix, values=values))
    present = [row for row in rows if row.accuracy is not None]
    return [
        replace(row, opens_group=index > 0 and present[index - 1].model != row.model)
        for index, row in enumerate(present)
    ]


def gain_rows(run: RunData) -> list[dict[str, Any]]:
    """Return, per student and baseline, the paired difference and the share of the gap to the teacher closed."""
    rows = []
    teacher = run.evaluations.get("teacher")
    for student in run.students:
        variants = run.variants(student)
        for kind in ("sft", "kd", "uld", "untouched"):
            if kind in variants and "distilled" in variants:
                ours, other = run.evaluations[variants["distilled"]], run.evaluations[variants[kind]]
                shared = sorted(ours.scores.keys() & other.scores.keys())
                differences = [ours.scores[key] - other.scores[key] for key in shared]
                room = None if teacher is None else teacher.accuracy - other.accuracy
                rows.append(
                    {
                        "student": student,
                        "baseline": KIND_LABELS[kind],
                        "difference": fmean(differences),
                        "margin": _margin(differences),
                        "closed": (ours.accuracy - other.accuracy) / room if room and room > 0 else None,
                    }
                )
    return rows


def _headline_row(
    run: RunData, model: str, *, kind: str, label: str, prefix: str, values: Mapping[str, Any]
) -> HeadlineRow:
    name = model if kind in ("teacher", "distilled") else f"{model}-{kind}"
    result = run.evaluations.get(name)
    agreement = None if kind == "teacher" else values.get(f"{prefix}teacher_agreement")
    return HeadlineRow(
        model=model,
        kind=kind,
        label=label,
        accuracy=values.get(f"{prefix}accuracy") if result is None else result.accuracy,
        margin=None if result is None else _margin(list(result.scores.values())),
        bits_per_byte=values.get(f"{prefix}bits_per_byte") if result is None else result.bits_per_byte,
        agreement=agreement if result is None else result.teacher_agreement,
        opens_group=False,
    )


def headline_caption(run: RunData) -> str:
    """Return what the columns of the headline table mean."""
    counts = sorted({result.num_samples for result in run.evaluations.values()})
    over = f"{' or '.join(map(str, counts))} held-out samples" if counts else "held-out samples"
    return (
        f"Accuracy over {over}, ± its 95 % interval over samples. Bits per byte: of the reference answers, "
        "comparable across tokenizers; lower is better. Agreement: normalised answers equal to the teacher's."
    )


def family_section(run: RunData) -> dict[str, Any] | None:
    """Return table and figure of accuracy by family; None where the teacher has none."""
    teacher = run.evaluations.get("teacher")
    if teacher is None or not teacher.accuracy_by_family:
        return None
    variants = {student: run.variants(student) for student in run.students if run.variants(student)}
    scores = {
        student: {kind: _by_group(run.evaluations[name]) for kind, name in kinds.items()}
        for student, kinds in variants.items()
    }
    columns = [(student, [KIND_LABELS[kind] for kind in kinds]) for student, kinds in scores.items()]
    groups = [_by_group(teacher)] + [values for kinds in scores.values() for values in kinds.values()]
    rows = [{"family": family, "values": [group.get(family) for group in groups]} for family in groups[0]]
    svg = accuracy_figure(scores, teacher=groups[0]) if scores else ""
    return {"svg": svg, "columns": columns, "rows": rows}


def _by_group(result: EvaluationResult) -> dict[str, float]:
    return {ALL: result.accuracy, **result.accuracy_by_family}


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _margin(values: Sequence[float]) -> float:
    """Half the 95 % interval of a mean, by the normal approximation."""
    return 1.96 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
