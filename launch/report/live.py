"""What the report says of a run that may still be going on: progress, validation, throughput, skipped updates."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from distill.config import STAGES
from launch.report.data import RunData, StageLog
from launch.report.figures import Panel, chain_stages, draw, shared_legend
from launch.report.training import stage_panels
from teacher_cache.progress import clock_text

RECENT = 20
"""Records that a figure of the present is the median of."""
MAX_SKIPPED = 20
"""Skipped updates that are listed, the last ones."""
NAMED_SAMPLES = 4
VALIDATION = {"bits_per_byte": ("bits per byte", "distilled")}
ACCURACY = {"accuracy": ("accuracy", "extra")}
SPEED = {"tokens_per_s": ("tokens per second", "distilled")}
SHARES = {
    "wait_fraction": ("waiting for data", "sft"),
    "padding_fraction": ("padding", "untouched"),
    "mfu": ("model FLOPs utilisation", "extra"),
}
MEMORY = {
    "peak_allocated_gib": ("device, allocated", "distilled"),
    "peak_rss_gib": ("process", "untouched"),
}


def progress_rows(run: RunData) -> list[dict[str, Any]]:
    """Return how far each stage of each student is, in the order in which they are trained."""
    logs = {(log.student, log.stage): log for log in run.stage_logs}
    order: dict[str, int] = {stage: index for index, stage in enumerate(STAGES)}
    students = dict.fromkeys(
        [*(student for student, _ in run.expected_stages), *(log.student for log in run.stage_logs)]
    )
    keys = sorted(
        {*run.expected_stages, *logs}, key=lambda key: (list(students).index(key[0]), order.get(key[1], len(order)))
    )
    rows = [_progress_row(student, stage, log=logs.get((student, stage))) for student, stage in keys]
    return [
        row | {"opens_group": index == 0 or rows[index - 1]["student"] != row["student"]}
        for index, row in enumerate(rows)
    ]


def watch_figures(run: RunData) -> dict[str, str]:
    """Return the SVG of validation and of throughput, empty where nothing of them was logged."""
    students = list(dict.fromkeys(log.student for log in run.stage_logs))
    scored = {name: stage_panels(run, name, metrics=[*VALIDATION, *ACCURACY]) for name in students}
    speeds = {name: stage_panels(run, name, metrics=[*SPEED, *SHARES, *MEMORY]) for name in students}
    return {
        "validation": _validation_figure({name: panels for name, panels in scored.items() if panels}),
        "throughput": _throughput_figure({name: panels for name, panels in speeds.items() if panels}),
    }


def skipped_rows(run: RunData) -> dict[str, Any] | None:
    """Return the updates that were not made, the last ones, and how many there were; None without any."""
    rows = [_skipped_row(log, fault) for log in run.stage_logs for fault in log.skipped_updates]
    return {"count": len(rows), "rows": rows[-MAX_SKIPPED:]} if rows else None


def _progress_row(student: str, stage: str, *, log: StageLog | None) -> dict[str, Any]:
    row: dict[str, Any] = {"student": student, "stage": stage, "state": "not begun", "step": None, "max_steps": None}
    row |= dict.fromkeys(("loss", "bits_per_byte", "tokens_per_s", "wait_fraction", "skipped", "remaining"))
    if log is None or not log.records:
        return row
    step = int(log.records[-1]["global_step"])
    remaining = _last(log, "time/remaining_s")
    row |= {
        "state": "done" if log.is_done else f"at {log.last_line_at}",
        "step": step,
        "max_steps": _last(log, "max_steps"),
        "loss": _last(log, "train/loss"),
        "bits_per_byte": _last(log, "validation/bits_per_byte"),
        "tokens_per_s": _recent(log, "throughput/tokens_per_s"),
        "wait_fraction": _recent(log, "data/wait_fraction"),
        "skipped": len(log.skipped_updates),
        "remaining": None if log.is_done or remaining is None else clock_text(remaining),
    }
    return row


def _last(log: StageLog, name: str) -> Any:
    return next((record[name] for record in reversed(log.records) if name in record), None)


def _recent(log: StageLog, name: str) -> float | None:
    values = [record[name] for record in log.records[-RECENT:] if name in record]
    return median(values) if values else None


def _skipped_row(log: StageLog, fault: Mapping[str, Any]) -> dict[str, Any]:
    ids = [id_ for share in fault.get("shares", ()) for id_ in share["sample_ids"]]
    more = f" and {len(ids) - NAMED_SAMPLES} more" if len(ids) > NAMED_SAMPLES else ""
    return {
        "student": log.student,
        "stage": log.stage,
        "step": fault["global_step"],
        "kind": fault["kind"],
        "loss": fault.get("loss"),
        "grad_norm": fault.get("grad_norm"),
        "samples": ", ".join(ids[:NAMED_SAMPLES]) + more,
    }


def _validation_figure(rows: Mapping[str, Sequence[Panel]]) -> str:
    with_accuracy = any(curve in panel.curves for panels in rows.values() for panel in panels for curve in ACCURACY)

    def paint(figure: Figure) -> None:
        axes = figure.subplots(len(rows), 1 + with_accuracy, squeeze=False)
        for line, (student, panels) in zip(axes, rows.items(), strict=True):
            chain_stages(line[0], panels, metrics=VALIDATION)
            line[0].set_title(f"{student}: bits per byte", loc="left")
            if with_accuracy:
                chain_stages(line[1], panels, metrics=ACCURACY)
                line[1].set_title("accuracy", loc="left")
                line[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))

    return draw(paint, height=0.3 + 2.3 * len(rows), prefix="validation") if rows else ""


def _throughput_figure(rows: Mapping[str, Sequence[Panel]]) -> str:
    def paint(figure: Figure) -> None:
        axes = figure.subplots(len(rows), 3, squeeze=False)
        for line, (student, panels) in zip(axes, rows.items(), strict=True):
            chain_stages(line[0], panels, metrics=SPEED)
            chain_stages(line[1], panels, metrics=SHARES)
            chain_stages(line[2], panels, metrics=MEMORY)
            line[0].set_title(f"{student}: tokens per second", loc="left")
            line[1].set_title("share of the step, of the rows", loc="left")
            line[2].set_title("peak memory, GiB", loc="left")
            line[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        shared_legend(figure, axes[:, 1:].ravel())

    return draw(paint, height=0.6 + 2.3 * len(rows), prefix="throughput") if rows else ""
