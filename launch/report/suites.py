"""What the report says about published benchmarks: suites.json as a table."""

from typing import Any

from launch.report.data import RunData
from launch.suites.known import KNOWN_SUITES, suite_of_task
from launch.suites.results import SuiteFigure, SuiteResult


def suite_section(run: RunData) -> dict[str, Any] | None:
    """Return the table of figures by task and student, and what failed; None where no suite ran."""
    record = run.suites
    if not record.results and not record.failures:
        return None
    students = tuple(dict.fromkeys(result.student for result in record.results))
    cells: dict[tuple[str, str, str, str, str], dict[str, Any]] = {}
    for result in record.results:
        for figure in result.figures:
            name = _name(result, figure)
            row = cells.setdefault((name, result.suite, figure.task, figure.metric, figure.filter), {})
            row[result.student] = _cell(figure, result=result)
    rows = [
        {
            "name": name,
            "task": task,
            "metric": metric if kind == "none" else f"{metric} ({kind})",
            "values": [of_students.get(student) for student in students],
        }
        for (name, _, task, metric, kind), of_students in cells.items()
    ]
    return {
        "students": students,
        "rows": rows,
        "caption": _caption(record.results),
        "failures": [f"{one.student}, {one.suite}: {one.reason}" for one in record.failures],
    }


def _name(result: SuiteResult, figure: SuiteFigure) -> str:
    known = None if result.included else suite_of_task(figure.task) or suite_of_task(result.suite)
    return known.name if known else result.suite


def _cell(figure: SuiteFigure, *, result: SuiteResult) -> dict[str, Any]:
    """Return a figure in per cent where its full score is known, otherwise as the task gave it."""
    known = () if result.included else KNOWN_SUITES
    full = next((one.full_score for one in known if (one.task, one.metric) == (result.suite, figure.metric)), 0)
    scale, unit = (100 / full, "\u202f%") if full else (1.0, "")
    return {
        "value": f"{figure.value * scale:.{1 if full else 4}{'f' if full else 'g'}}{unit}",
        "stderr": None if figure.stderr is None else f"{figure.stderr * scale:.2g}",
        "num_samples": figure.num_samples,
        "limited": result.limit is not None,
    }


def _caption(results: tuple[SuiteResult, ...]) -> str:
    versions = ", ".join(sorted({result.lmms_eval for result in results}))
    judges = sorted({result.judge for result in results if result.judge})
    judged = f" Scored in part by the judge model {', '.join(judges)}." if judges else ""
    unjudged = (one.suite for one in results if one.judge is None and not one.included)
    lacking = {known.name for suite in unjudged if (known := suite_of_task(suite)) and known.judge}
    if lacking:
        judged += f" Without a judge model, so that answers count as wrong or guessed: {', '.join(sorted(lacking))}."
    return (
        f"By lmms-eval {versions}, in the students' own words; ± the standard error that it gives, and the number of "
        f"questions.{judged} A star marks a try on the first questions only."
    )
