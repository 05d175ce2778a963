"""Figures of the report about training: losses, use of the question, features."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from launch.report.data import RunData, StageLog
from launch.report.embedding import Features, embed, read_features, similarities
from launch.report.figures import TERMS, Curve, Panel, losses_figure, question_figure, scatter_figure
from teacher_cache.errors import DataError

MAX_POINTS = 1000
"""Of a curve: more steps than the page has pixels are thinned out evenly."""
QUESTION_METRICS = ("boundary_ce", "rest_ce", "question_shuffle_gap")


def training_figures(run: RunData) -> dict[str, str] | None:
    """Return the SVG of the losses and of the question-shuffle gap, empty where nothing was logged."""
    if not run.stage_logs:
        return None
    names = sorted({log.student for log in run.stage_logs})
    baselines = {f"{student}-{kind}" for student in run.students for kind in ("sft", "kd", "uld")}
    losses = {name: stage_panels(run, name, metrics=TERMS) for name in names if name not in baselines}
    question = {name: stage_panels(run, name, metrics=QUESTION_METRICS) for name in losses}
    losses = {name: panels for name, panels in losses.items() if panels}
    question = {name: panels for name, panels in question.items() if panels}
    sft = {name: _own_losses(run, f"{name}-sft") for name in losses}
    return {
        "losses": losses_figure(losses, baselines=sft) if losses else "",
        "question": question_figure(question) if question else "",
    }


def feature_items(run: RunData, *, notes: list[str]) -> list[dict[str, Any]]:
    """Return the embedding figure, its caption and the similarities per student with features on disk."""
    items: list[dict[str, Any]] = []
    for student in run.students:
        logs = [log for log in run.stage_logs if log.student == student]
        try:
            steps = _feature_steps(logs)
        except (DataError, OSError, ValueError) as error:
            notes.append(f"features of {student} were not read: {error}")
            continue
        if steps:
            items.append(_feature_item(student, steps, prefix=f"features{len(items)}"))
        else:
            notes.append(f"no features_first.safetensors and features_last.safetensors of {student}")
    return items


def stage_panels(run: RunData, student: str, *, metrics: Iterable[str]) -> list[Panel]:
    """Return a panel per stage of a student that logged any of the metrics, with their curves."""
    panels = []
    for log in run.stage_logs:
        if log.student == student:
            curves = {name: curve for name in metrics if (curve := curve_of(log, name)) is not None}
            if curves:
                panels.append(Panel(title=log.stage, curves=curves))
    return panels


def _own_losses(run: RunData, student: str) -> dict[str, Curve]:
    logs = (log for log in run.stage_logs if log.student == student)
    return {log.stage: curve for log in logs if (curve := curve_of(log, "sft_loss")) is not None}


def curve_of(log: StageLog, name: str) -> Curve | None:
    """Return one metric, whatever group it is logged under (``train/ce_loss``), or None without a positive step."""
    points = []
    for record in log.records:
        for key, value in record.items():
            if key.rpartition("/")[2] == name and isinstance(value, int | float):
                points.append((int(record["global_step"]), float(value)))
    if not points or (name in TERMS and all(value == 0 for _, value in points)):
        return None
    # the last point is always there
    kept = points[:: -math.ceil(len(points) / MAX_POINTS)][::-1]
    steps, values = zip(*kept, strict=True)
    return Curve(steps=steps, values=values)


def _feature_steps(logs: list[StageLog]) -> dict[str, Features]:
    """Return the features of the first and the last step over all stages, by a title that names the stage."""
    first = [log for log in logs if (log.folder / "features_first.safetensors").exists()]
    last = [log for log in logs if (log.folder / "features_last.safetensors").exists()]
    if not first or not last:
        return {}
    return {
        f"{first[0].stage}, first step": read_features(first[0].folder / "features_first.safetensors"),
        f"{last[-1].stage}, last step": read_features(last[-1].folder / "features_last.safetensors"),
    }


def _feature_item(student: str, steps: Mapping[str, Features], *, prefix: str) -> dict[str, Any]:
    panels = {
        f"{title}\n{space}'s space": sets
        for title, features in steps.items()
        for space, sets in embed(features).items()
    }
    first, last = (similarities(features) for features in steps.values())
    features = next(iter(steps.values()))
    widths = ", ".join(f"{name} {values.shape[1]}" for name, values in sorted(features.items()))
    count = len(next(iter(features.values())))
    return {
        "student": student,
        "svg": scatter_figure(panels, prefix=prefix),
        "num_samples": count,
        "caption": (
            f"t-SNE of features averaged per sample, {count} samples (widths: {widths}). z_s: the student's question "
            "states; z_l: the teacher's question states; r_s, r_l: the Recalibrator's outputs for the student's and "
            "for the teacher's question states. z_l, r_s and r_l share the teacher's space and are embedded together, "
            "standardised over all three; z_s has a space, and so a panel, of its own: no distance between the two is "
            "defined. Positions and axes do not carry over from one panel to another."
        ),
        "similarities": [{"pair": " and ".join(pair), "first": first[pair], "last": last.get(pair)} for pair in first],
    }
