"""The figures of the study's page, one SVG file each."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from launch.report.embedding import Features
from launch.study.results import Row
from launch.study.statistics import accuracy, estimate
from launch.study.tables import TEACHER, by_arm

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "genrecal",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
}
INTERVAL_ROOM = 0.05
"""Accuracy beside the outermost means; the interval of two seeds may be wider than all else in a panel."""
LABEL_GAP_IN = 0.11
"""Least distance of two labels, in inches."""
PANEL_IN = 3.4
"""Least height of a panel with labels beside it."""
LETTER_IN, HANDLE_IN = 0.07, 0.6
"""Width of a letter of the legend, and of what stands beside an entry, in inches."""
MARKERS = {"z_s": "o", "r_s": "o", "z_l": "x", "r_l": "^"}
Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Steps and values by arm."""


def draw(path: Path, paint: Callable[[Figure], None], *, width: float = 8.0, height: float) -> None:
    """Write one figure."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        partial = path.with_suffix(".partial")
        figure.savefig(partial, format="svg", metadata={"Date": None}, facecolor="white")
    partial.replace(path)


def accuracy_figure(rows: Sequence[Row], path: Path) -> None:
    """Draw the accuracy of each arm with its interval, one panel per student."""
    students = _students(rows)
    arms = list(by_arm(row for row in rows if row.arm != TEACHER))

    def paint(figure: Figure) -> None:
        axes = figure.subplots(1, len(students), squeeze=False, sharey=True)[0]
        for axis, student in zip(axes, students, strict=True):
            means = []
            for teacher, color in _teacher_colors(rows).items():
                own = by_arm(row for row in rows if row.student == student and row.teacher == teacher)
                for arm, found in own.items():
                    one = estimate([row.accuracy for row in found])
                    margin = 0 if np.isnan(one.margin) else one.margin
                    place = arms.index(arm)
                    means.append(one.mean)
                    axis.errorbar(
                        one.mean, place, xerr=margin, fmt="o", ms=4, color=color, label=teacher or "no teacher"
                    )
            axis.set_title(student)
            axis.set_xlim(min(means) - INTERVAL_ROOM, max(means) + INTERVAL_ROOM)
            axis.set_yticks(range(len(arms)), arms)
            axis.set_ylim(len(arms) - 0.5, -0.5)
        figure.supxlabel("accuracy, 95 % interval over seeds", fontsize=9)
        _legend(figure, axes)

    draw(path, paint, height=1.6 + 0.24 * len(arms))


def cost_figure(rows: Sequence[Row], path: Path, *, cost: Callable[[Row], float], label: str) -> None:
    """Draw mean accuracy against a cost, one panel per student, each arm a point with its name."""
    points = {student: _cost_points(rows, student, cost=cost) for student in _students(rows)}
    panel = max(PANEL_IN, LABEL_GAP_IN * max(len(own) for own in points.values()))

    def paint(figure: Figure) -> None:
        axes = figure.subplots(1, len(points), squeeze=False)[0]
        for axis, (student, own) in zip(axes, points.items(), strict=True):
            for point in own:
                axis.plot(point.x, point.y, "o", ms=4, color=point.color, label=point.teacher or "no teacher")
            _name_points(axis, own, gap=LABEL_GAP_IN / panel)
            axis.set_title(student)
            axis.set_xlabel(label)
            axis.set_ylabel("accuracy")
        _legend(figure, axes)

    draw(path, paint, width=4.5 * len(points), height=panel + 1.2)


@dataclass(frozen=True, kw_only=True)
class _Point:
    """An arm with one teacher."""

    x: float
    y: float
    arm: str
    teacher: str | None
    color: str


def _cost_points(rows: Sequence[Row], student: str, *, cost: Callable[[Row], float]) -> list[_Point]:
    """Return a student's points, the least accurate first."""
    points = []
    for teacher, color in _teacher_colors(rows).items():
        for arm, found in by_arm(row for row in rows if row.student == student and row.teacher == teacher).items():
            x, y = (float(np.mean([value(row) for row in found])) for value in (cost, accuracy))
            points.append(_Point(x=x, y=y, arm=arm, teacher=teacher, color=color))
    return sorted(points, key=lambda point: (point.y, point.x))


def _name_points(axis: Axes, points: Sequence[_Point], *, gap: float) -> None:
    """Write the names of points, sorted by y, beside the panel, a line from each to its point."""
    low, high = axis.get_ylim()
    heights = ((point.y - low) / (high - low) for point in points)
    for place, point in zip(spread(heights, gap=gap), points, strict=True):
        axis.annotate(
            point.arm,
            (point.x, point.y),
            (1.04, place),
            textcoords="axes fraction",
            fontsize=6,
            va="center",
            color=point.color,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "lw": 0.3, "color": point.color, "relpos": (0, 0.5), "shrinkB": 2},
        )


def spread(heights: Iterable[float], *, gap: float) -> list[float]:
    """Return ascending heights between 0 and 1, moved as little as keeps neighbours ``gap`` apart, if there is room."""
    places: list[float] = []
    for height in heights:
        places.append(height if not places else max(height, places[-1] + gap))
    ceiling = 1.0
    for index in reversed(range(len(places))):
        places[index] = min(places[index], ceiling)
        ceiling = places[index] - gap
    return places


def gap_figure(curves: Mapping[str, Mapping[str, Curves]], path: Path) -> None:
    """Draw the question-shuffle gap over training: pair -> kind of rows -> arm -> curve."""
    arms = dict.fromkeys(arm for panels in curves.values() for own in panels.values() for arm in own)
    lines = itertools.product(("-", "--", ":"), matplotlib.color_sequences["tab20"])
    styles = {arm: {"ls": dash, "color": color} for arm, (dash, color) in zip(arms, itertools.cycle(lines))}

    def paint(figure: Figure) -> None:
        kinds = list(next(iter(curves.values())))
        axes = figure.subplots(len(curves), len(kinds), squeeze=False)
        for line, (pair, panels) in zip(axes, curves.items(), strict=True):
            for axis, kind in zip(line, kinds, strict=True):
                for arm, (steps, values) in panels[kind].items():
                    axis.plot(steps, values, marker=".", ms=2, lw=1, label=arm, **styles[arm])
                axis.set_title(f"{pair}: {kind} rows", fontsize=8)
                axis.set_xlabel("step, align then distill")
            line[0].set_ylabel("question-shuffle gap, nats per token")
        _legend(figure, axes.ravel())

    draw(path, paint, width=9.0, height=0.8 + 2.6 * len(curves))


def embedding_figure(panels: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw embedded features: title -> set -> points."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots(-(-len(panels) // 4), min(4, len(panels)), squeeze=False).ravel()
        for axis, (title, sets) in zip(axes, panels.items(), strict=False):
            for name, points in sets.items():
                axis.scatter(*np.asarray(points).T, s=9, marker=MARKERS[name], linewidths=0.8, alpha=0.7, label=name)
            axis.set_title(title, fontsize=7)
            axis.set(xticks=[], yticks=[])
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        _legend(figure, axes)

    draw(path, paint, width=10.0, height=0.6 + 2.6 * -(-len(panels) // 4))


def cosine_figure(features: Mapping[str, Features], path: Path) -> None:
    """Draw, per arm, the cosines of the Recalibrator's pooled outputs: students' questions by teacher's questions."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots(1, len(features), squeeze=False)[0]
        for axis, (arm, found) in zip(axes, features.items(), strict=True):
            cosines = cosine_matrix(found["r_s"], found["r_l"])
            image = axis.imshow(cosines, cmap="viridis", vmin=-1, vmax=1)
            axis.set_title(f"{arm}: diagonal {np.diag(cosines).mean():.2f}, others {_others(cosines):.2f}", fontsize=8)
            axis.set(xlabel="sample, r_l", ylabel="sample, r_s")
            axis.grid(visible=False)
        figure.colorbar(image, ax=list(axes), shrink=0.8)

    draw(path, paint, width=4.0 * len(features), height=3.6)


def cosine_matrix(
    left: Float[np.ndarray, "samples width"], right: Float[np.ndarray, "samples width"]
) -> Float[np.ndarray, "samples samples"]:
    """Return the cosine of each vector of one set with each of the other, both centred.

    Without the mean, which all samples share, every cosine is near 1.
    """
    sides = [values - values.mean(0) for values in (left, right)]
    units = [values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12) for values in sides]
    return units[0] @ units[1].T


def _others(matrix: Float[np.ndarray, "samples samples"]) -> float:
    return float(matrix[~np.eye(len(matrix), dtype=bool)].mean())


def _students(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.student for row in rows if row.student is not None))


def _teacher_colors(rows: Sequence[Row]) -> dict[str | None, str]:
    teachers = dict.fromkeys(row.teacher for row in rows if row.student is not None)
    named = [teacher for teacher in teachers if teacher is not None]
    return {None: "#666666", **{teacher: f"C{index}" for index, teacher in enumerate(named)}}


def _legend(figure: Figure, axes: Iterable[Axes]) -> None:
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if entries:
        longest = max(len(label) for label in entries)
        columns = int(figure.get_figwidth() / (LETTER_IN * longest + HANDLE_IN))
        columns = max(1, min(6, len(entries), columns))
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=columns)
