"""The study's page: tables between its markers, figures beside it, all from the results and the runs' own logs."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distill.config import STAGES
from launch.report.embedding import Features, embed, read_features
from launch.study.command import RESULTS, Failure
from launch.study.config import StudyConfig
from launch.study.figures import (
    Curves,
    accuracy_figure,
    cosine_figure,
    cost_figure,
    embedding_figure,
    gap_figure,
)
from launch.study.grid import plan_cells
from launch.study.records import GAPS, STUDENT, metrics
from launch.study.results import Row, read_table
from launch.study.tables import claim_table, pair_tables, teacher_table
from teacher_cache.errors import DataError

if TYPE_CHECKING:
    from distill.config import Stage

BEGIN, END = "<!-- study: begin -->", "<!-- study: end -->"
GAP_TITLES = {"question": "all", "boundary": "boundary", "rest": "other"}
REGULARIZED, FREE = "genrecal", "genrecal_no_regularization"
"""Arms whose features are compared, with the regularization and without."""
FIGURES = {
    "accuracy": "Accuracy by arm; points of a student without a teacher are untouched and SFT.",
    "accuracy-by-flops": "Accuracy against the FLOPs of the student's training.",
    "accuracy-by-cache": "Accuracy against the bytes that are read of the cache.",
    "shuffle-gap": "The question-shuffle gap over training, first seed: near 0 the losses teach the student nothing.",
    "features": "t-SNE of features averaged per sample, at the first and the last step, first seed. Each space is "
    "embedded on its own: distances between panels mean nothing.",
    "cosines": "Cosines of the Recalibrator's pooled, centred outputs for the student's questions (r_s) and for the "
    "teacher's (r_l), after the last step with a Recalibrator: a diagonal that stands out means that both agree.",
}


def write_report(config: StudyConfig, *, config_path: str, failures: Sequence[Failure]) -> Path:
    """Write figures, and the tables into the page, whose other text stays; return the page.

    Raises:
        DataError: The page has no markers.
    """
    folder = Path(config.report_dir)
    rows = read_table(folder / RESULTS)
    _draw_figures(config, rows, folder=folder)
    page = folder.with_suffix(".md")
    old = page.read_text(encoding="utf-8") if page.exists() else f"# Study\n\n{BEGIN}\n{END}\n"
    if BEGIN not in old or END not in old:
        raise DataError(f"{page} has no place for the tables: put the lines {BEGIN} and {END} into it")
    told = f"{BEGIN}\n\n{render(config, rows, config_path=config_path, failures=failures)}\n\n{END}"
    new = re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: told, old, flags=re.DOTALL)
    partial = page.with_suffix(".partial")
    partial.write_text(new, encoding="utf-8")
    partial.replace(page)
    return page


def render(config: StudyConfig, rows: Sequence[Row], *, config_path: str, failures: Sequence[Failure]) -> str:
    """Return what stands between the markers."""
    folder = Path(config.report_dir)
    finished = {(row.arm, row.student, row.teacher, row.seed) for row in rows}
    cells = plan_cells(config)
    done = sum((cell.arm.name, cell.student, cell.teacher, cell.seed) in finished for cell in cells)
    # rows of earlier stages are of the same runs
    hours = sum({row.folder: row.seconds for row in rows}.values()) / 3600
    parts = [
        f"{done} of {len(cells)} runs of `{config_path}` are done: {hours:.1f} hours of optimizer steps. Accuracies "
        f"are in per cent of {config.data.num_test} held-out questions, ± the 95 % t interval over seeds; differences "
        "are paired by seed. An interval is about repeating the training, not about other questions or students.",
        *(f"Failed: {failure.name}: {failure.error}" for failure in failures),
        "## Claims",
        claim_table(config, rows),
        "## Teachers",
        teacher_table(rows),
        "## Arms",
        pair_tables(rows),
        "## Figures",
        *(
            f"![{caption}]({folder.name}/{name}.svg)\n\n{caption}"
            for name, caption in FIGURES.items()
            if (folder / f"{name}.svg").exists()
        ),
    ]
    return "\n\n".join(parts)


def _draw_figures(config: StudyConfig, rows: Sequence[Row], *, folder: Path) -> None:
    students = [row for row in rows if row.student is not None]
    if not students:
        return
    accuracy_figure(rows, folder / "accuracy.svg")
    for name, label, cost in (
        ("accuracy-by-flops", "TFLOPs of the student's training", lambda row: row.student_flops / 1e12),
        ("accuracy-by-cache", "MB read of the cache", lambda row: row.cache_bytes / 1e6),
    ):
        cost_figure(students, folder / f"{name}.svg", cost=cost, label=label)
    runs = _first_runs(config, students)
    if curves := gap_curves(runs):
        gap_figure(curves, folder / "shuffle-gap.svg")
    if panels := dict(_embedded(runs)):
        embedding_figure(panels, folder / "features.svg")
    if compared := _last_features(runs):
        cosine_figure(compared, folder / "cosines.svg")


def _first_runs(config: StudyConfig, rows: Sequence[Row]) -> dict[str, dict[str, Path]]:
    """Return the run folders of each pair's first seed that are still there, by arm."""
    runs: dict[str, dict[str, Path]] = {}
    for row in rows:
        folder = Path(config.output_dir) / row.folder
        if row.teacher is not None and "@" not in row.arm and folder.is_dir():
            runs.setdefault(f"{row.student} from {row.teacher}", {}).setdefault(row.arm, folder)
    return runs


def gap_curves(runs: Mapping[str, Mapping[str, Path]]) -> dict[str, Mapping[str, Curves]]:
    """Return the gap over the steps of align and distill, for pairs that have any: pair, kind of rows, arm."""
    curves: dict[str, Mapping[str, Curves]] = {}
    for pair, arms in runs.items():
        panels: dict[str, Curves] = {
            GAP_TITLES[rows]: {
                arm: curve for arm, folder in arms.items() if (curve := _gap_curve(folder, rows=rows))[0]
            }
            for rows in GAPS
        }
        if any(panels.values()):
            curves[pair] = panels
    return curves


def _gap_curve(folder: Path, *, rows: str) -> tuple[list[float], list[float]]:
    steps: list[float] = []
    values: list[float] = []
    offset = 0.0
    for stage in ("align", "distill"):
        last = 0.0
        for record in metrics(folder, stage):
            last = max(last, record["global_step"])
            if (value := record.get(f"train/{rows}_shuffle_gap")) is not None:
                steps.append(offset + record["global_step"])
                values.append(value)
        offset += last
    return steps, values


def _features(folder: Path) -> dict[str, Features]:
    """Return the features of a run's first and last step, by stage and step."""
    stages: list[Stage] = [stage for stage in STAGES if (folder / "training" / STUDENT / stage).is_dir()]
    paths = {
        f"{stage}, {step} step": folder / "training" / STUDENT / stage / f"features_{step}.safetensors"
        for stage in stages
        for step in ("first", "last")
    }
    there = {title: path for title, path in paths.items() if path.exists()}
    if len(there) < 2:
        return {}
    titles = list(there)
    return {title: read_features(there[title]) for title in (titles[0], titles[-1])}


def _embedded(runs: Mapping[str, Mapping[str, Path]]) -> Iterator[tuple[str, Mapping[str, object]]]:
    for pair, arms in runs.items():
        if REGULARIZED in arms:
            for title, features in _features(arms[REGULARIZED]).items():
                for space, sets in embed(features).items():
                    yield f"{pair}\n{title}\n{space}'s space", sets


def _last_features(runs: Mapping[str, Mapping[str, Path]]) -> dict[str, Features]:
    """Return the last features of the first pair that has both arms with the teacher's question rows."""
    for arms in runs.values():
        both = {arm: list(_features(arms[arm]).values()) for arm in (REGULARIZED, FREE) if arm in arms}
        compared = {arm: steps[-1] for arm, steps in both.items() if steps and {"r_s", "r_l"} <= steps[-1].keys()}
        if len(compared) == 2:
            return compared
    return {}
