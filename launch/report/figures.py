"""The report's figures as inline SVG that follows the page's light or dark colours.

Matplotlib draws with placeholder colours, which become CSS variables of the page; text stays text in the
page's own font. Each function returns the SVG of one figure.
"""

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator, PercentFormatter

from launch.console import format_bytes

WIDTH = 9.0
NAMES = ("ink", "muted", "grid", "page", "teacher", "untouched", "sft", "distilled", "kd", "uld", "extra")
COLORS = {name: f"#0a0b{index:02x}" for index, name in enumerate(NAMES, start=16)}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "genrecal",
    "font.size": 10,
    "text.color": COLORS["ink"],
    "axes.labelcolor": COLORS["ink"],
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": COLORS["muted"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": COLORS["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": COLORS["muted"],
    "ytick.color": COLORS["muted"],
    "xtick.labelcolor": COLORS["ink"],
    "ytick.labelcolor": COLORS["ink"],
    "figure.facecolor": "none",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}
KIND_LABELS = {
    "untouched": "untouched",
    "sft": "SFT only",
    "kd": "same-tokenizer KD",
    "uld": "ULD",
    "distilled": "distilled",
}
TERMS = {
    "loss": ("total", "ink"),
    "sft_loss": ("student's own CE", "sft"),
    "ce_loss": ("Recalibrator CE", "distilled"),
    "kl_loss": ("Recalibrator KL", "kd"),
    "kd_loss": ("divergence of kd", "kd"),
    "uld_loss": ("distance of uld", "uld"),
    "regularization_loss": ("regularization", "extra"),
}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One quantity over the steps of one stage."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel of curves by metric name."""

    title: str
    curves: Mapping[str, Curve]


def draw(paint: Callable[[Figure], None], *, height: float, prefix: str) -> str:
    """Return a figure as SVG for a page; ``prefix`` keeps its element ids apart from other figures'."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        paint(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _inline(buffer.getvalue(), prefix=prefix)


def accuracy_figure(scores: Mapping[str, Mapping[str, Mapping[str, float]]], *, teacher: Mapping[str, float]) -> str:
    """Draw accuracy per family: per student (outer key) bars per kind of model, the teacher as a line over each group.

    Args:
        scores: Student -> kind (untouched, sft, kd, uld, distilled) -> group -> accuracy.
        teacher: Group -> accuracy; its order is the order of the groups.
    """

    def paint(figure: Figure) -> None:
        axes = figure.subplots(len(scores), 1, squeeze=False, sharex=True)[:, 0]
        for axis, (student, kinds) in zip(axes, scores.items(), strict=True):
            _grouped_bars(axis, kinds, teacher=teacher)
            axis.set_title(student)
        axes[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.08), ncols=5)

    return draw(paint, height=0.7 + 2.5 * len(scores), prefix="accuracy")


def losses_figure(rows: Mapping[str, Sequence[Panel]], *, baselines: Mapping[str, Mapping[str, Curve]]) -> str:
    """Draw every loss term by stage, one row per student.

    Args:
        rows: Student -> one panel per stage.
        baselines: Student -> stage (title of a panel) -> the SFT baseline's own cross-entropy, drawn dotted.
    """

    def paint(figure: Figure) -> None:
        columns = max(len(panels) for panels in rows.values())
        axes = figure.subplots(len(rows), columns, squeeze=False)
        for line, (student, panels) in zip(axes, rows.items(), strict=True):
            for axis, panel in zip(line, panels, strict=False):
                _loss_panel(axis, panel, baseline=baselines.get(student, {}).get(panel.title))
            line[0].set_ylabel(f"{student}\nnats per token")
            for axis in line[len(panels) :]:
                axis.set_axis_off()
        shared_legend(figure, axes.ravel())

    return draw(paint, height=0.6 + 2.5 * len(rows), prefix="losses")


def question_figure(rows: Mapping[str, Sequence[Panel]]) -> str:
    """Draw, per student, boundary and rest cross-entropy on the left and the question-shuffle gap on the right."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots(len(rows), 2, squeeze=False)
        for line, (student, panels) in zip(axes, rows.items(), strict=True):
            chain_stages(
                line[0], panels, metrics={"boundary_ce": ("boundary row", "distilled"), "rest_ce": ("rest", "sft")}
            )
            chain_stages(
                line[1], panels, metrics={"question_shuffle_gap": ("questions shuffled minus matched", "extra")}
            )
            line[0].set_title(f"{student}: Recalibrator CE", loc="left")
            line[1].set_title("question-shuffle gap", loc="left")
            line[0].set_ylabel("nats per token")
        shared_legend(figure, axes.ravel())

    return draw(paint, height=0.6 + 2.5 * len(rows), prefix="question")


def sizes_figure(sizes: Mapping[str, int], *, labels: Mapping[str, str]) -> str:
    """Draw bytes as bars on a logarithmic axis, each with its ``labels`` text behind it."""

    def paint(figure: Figure) -> None:
        axis = figure.subplots()
        names = list(sizes)[::-1]
        colors = [COLORS["muted"] if name.startswith("full") else COLORS["distilled"] for name in names]
        axis.barh(names, [sizes[name] for name in names], color=colors, height=0.62)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(base=2, numticks=8))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda size, _: format_bytes(size)))
        axis.xaxis.set_minor_locator(NullLocator())
        positive = [size for size in sizes.values() if size > 0]
        axis.set_xlim(min(positive) / 4, max(positive) * 30)
        for index, name in enumerate(names):
            axis.annotate(
                labels[name],
                (max(sizes[name], min(positive) / 4), index),
                (6, 0),
                textcoords="offset points",
                va="center",
            )
        axis.set_xlabel("logarithmic")
        axis.grid(axis="x")
        axis.grid(visible=False, axis="y")

    return draw(paint, height=0.9 + 0.36 * len(sizes), prefix="sizes")


def scatter_figure(panels: Mapping[str, Mapping[str, Any]], *, prefix: str) -> str:
    """Draw embedded points: title of a panel -> name of a set of vectors -> its points [samples, 2]."""
    styles = {"z_s": ("sft", "o"), "r_s": ("distilled", "o"), "z_l": ("ink", "x"), "r_l": ("extra", "^")}

    def paint(figure: Figure) -> None:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (title, sets) in zip(axes, panels.items(), strict=True):
            for name, points in sets.items():
                color, marker = styles[name]
                width = 0.8 if marker == "x" else 0
                axis.scatter(
                    *np.asarray(points).T,
                    s=11,
                    marker=marker,
                    linewidths=width,
                    color=COLORS[color],
                    alpha=0.7,
                    label=name,
                )
            axis.set_title(title, fontsize=10)
            axis.set(xticks=[], yticks=[])
            axis.spines[["top", "right"]].set_visible(True)
        shared_legend(figure, axes)

    return draw(paint, height=3.0, prefix=prefix)


def _grouped_bars(axis: Axes, kinds: Mapping[str, Mapping[str, float]], *, teacher: Mapping[str, float]) -> None:
    groups = list(teacher)
    width = 0.8 / len(kinds)
    for index, (kind, values) in enumerate(kinds.items()):
        left = [group - 0.4 + index * width for group in range(len(groups))]
        heights = [values.get(group, math.nan) for group in groups]
        axis.bar(left, heights, width * 0.92, align="edge", color=COLORS[kind], label=KIND_LABELS[kind])
    places = np.arange(len(groups))
    axis.hlines(list(teacher.values()), places - 0.44, places + 0.42, color=COLORS["teacher"], lw=2, label="teacher")
    axis.set_xticks(places, groups)
    axis.tick_params(axis="x", length=0)
    axis.set_ylim(0, 1.02)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))


def _loss_panel(axis: Axes, panel: Panel, *, baseline: Curve | None) -> None:
    for name, curve in panel.curves.items():
        label, color = TERMS[name]
        axis.plot(curve.steps, curve.values, color=COLORS[color], label=label, lw=1.0 if name == "loss" else 1.6)
    if baseline is not None:
        axis.plot(baseline.steps, baseline.values, color=COLORS["sft"], ls=(0, (1, 1.2)), label="the same, SFT only")
    curves = [*panel.curves.values(), *([baseline] if baseline else [])]
    values = [value for curve in curves for value in curve.values]
    if values and min(values) > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_title(panel.title)
    axis.set_xlabel("step")


def chain_stages(axis: Axes, panels: Sequence[Panel], *, metrics: Mapping[str, tuple[str, str]]) -> None:
    """Plot stages one behind the other, a thin line between them."""
    lengths = [max((curve.steps[-1] for curve in panel.curves.values()), default=0) for panel in panels]
    starts = [sum(lengths[:index]) for index in range(len(panels) + 1)]
    for name, (label, color) in metrics.items():
        for panel, start in zip(panels, starts, strict=False):
            if (curve := panel.curves.get(name)) is not None:
                steps = [start + step for step in curve.steps]
                marker = "o" if len(steps) < 40 else ""
                axis.plot(steps, curve.values, color=COLORS[color], label=label, marker=marker, ms=3)
    low, high = axis.get_ylim()
    # room for the stages' names, also over a line that is level
    axis.set_ylim(min(low, 0), high + 0.2 * (high - min(low, 0)))
    for panel, (start, stop) in zip(panels, pairwise(starts), strict=True):
        axis.axvline(stop, color=COLORS["grid"], lw=0.8)
        axis.annotate(panel.title, ((start + stop) / 2, 1), (0, -2), textcoords="offset points",
                      xycoords=("data", "axes fraction"), ha="center", va="top", color=COLORS["muted"])  # fmt: skip
    axis.set_xlabel("step")


def shared_legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """Put one legend over all axes, each label once."""
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if entries:
        columns = len(entries) if len(entries) < 6 else math.ceil(len(entries) / 2)
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=columns, markerscale=1.6)


def _inline(svg: str, *, prefix: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", svg, count=5)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", svg)
    return re.sub("|".join(COLORS.values()), lambda match: f"var(--{_NAME_OF[match[0]]})", svg)


_NAME_OF = {color: name for name, color in COLORS.items()}
