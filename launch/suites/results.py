"""What lmms-eval found: its file read strictly, and suites.json, the record that the report shows."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from pydantic import ValidationError

from launch.suites.environment import Suite
from teacher_cache.config import StrictConfig
from teacher_cache.durable_files import replace_file
from teacher_cache.errors import DataError

RECORD = "suites.json"
"""In the folder of a run, beside results.json."""


class SuiteFigure(StrictConfig):
    """One figure of one task."""

    task: str
    version: str
    """Of the task, as its authors count."""
    metric: str
    filter: str
    """How the answer was read from what the model said; `none` where as it is."""
    value: float
    stderr: float | None
    num_samples: int | None
    """None for a figure over several tasks."""


class SuiteResult(StrictConfig):
    """A suite that one student has been through."""

    student: str
    source: str
    """What the student was loaded from: a model of the hub, or a directory, seen from that of the record if inside."""
    suite: str
    """Task or group of lmms-eval."""
    included: bool
    """Whether it came from a folder of the user, so that its name says nothing."""
    identity: str
    """SHA-256 over what decides the figures: weights and other files of the student, tasks, judge, settings."""
    lmms_eval: str
    dtype: str
    limit: int | None
    """Only so many questions of each task; None for all."""
    judge: str | None
    """Model that scored answers; None where none did."""
    finished: str
    seconds: float
    figures: tuple[SuiteFigure, ...]


class SuiteFailure(StrictConfig):
    """A suite that came to no end."""

    student: str
    source: str
    suite: str
    identity: str
    """As of a result."""
    reason: str
    log: str
    """Where lmms-eval says more."""


class SuiteRecord(StrictConfig):
    """What suites.json holds: one entry per student and suite, in one of the lists."""

    results: tuple[SuiteResult, ...] = ()
    failures: tuple[SuiteFailure, ...] = ()

    def result(self, student: str, suite: str) -> SuiteResult | None:
        """Return what is known of a student and a suite."""
        return next((one for one in self.results if (one.student, one.suite) == (student, suite)), None)

    def sources(self, student: str) -> set[str]:
        """Return what a student of this name was loaded from."""
        pairs = [(one.student, one.source) for one in self.results] + [
            (one.student, one.source) for one in self.failures
        ]
        return {source for name, source in pairs if name == student}

    def without(self, student: str, suite: str) -> "SuiteRecord":
        """Return the record with nothing of a student and a suite."""
        pair = (student, suite)
        return SuiteRecord(
            results=tuple(one for one in self.results if (one.student, one.suite) != pair),
            failures=tuple(one for one in self.failures if (one.student, one.suite) != pair),
        )

    def with_outcome(self, outcome: SuiteResult | SuiteFailure) -> "SuiteRecord":
        """Return the record with an outcome in the place of earlier ones."""
        others = self.without(outcome.student, outcome.suite)
        if isinstance(outcome, SuiteFailure):
            return SuiteRecord(results=others.results, failures=(*others.failures, outcome))
        return SuiteRecord(results=(*others.results, outcome), failures=others.failures)


def read_record(path: Path) -> SuiteRecord:
    """Read suites.json; an empty record where there is none.

    Raises:
        DataError: It holds something else.
    """
    if not path.exists():
        return SuiteRecord()
    try:
        return SuiteRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(f"{path} is no record of suites: {error}") from error


def write_record(record: SuiteRecord, path: Path) -> None:
    """Write suites.json, replacing the old one durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (record.model_dump_json(indent=2) + "\n").encode())


def read_figures(path: Path, *, suite: Suite) -> tuple[SuiteFigure, ...]:
    """Read the figures of a suite from the file that lmms-eval wrote.

    Raises:
        DataError: The file is none of lmms-eval 0.7, lacks a task of the suite, or has no figure.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        results, versions, samples = content["results"], content["versions"], content["n-samples"]
        if lacking := sorted(set(suite.parts) - results.keys()):
            raise DataError(f"{path} lacks {', '.join(lacking)} of suite {suite.task}: see its log")
        figures = tuple(
            figure
            for task in dict.fromkeys((suite.task, *suite.parts))
            if task in results
            for figure in _figures(task, results[task], version=str(versions.get(task, "")), samples=samples)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is no result of lmms-eval: {type(error).__name__}: {error}") from error
    if not figures:
        raise DataError(f"{path}: suite {suite.task} gives no figure; it may only write answers for a server to score")
    return figures


def _figures(task: str, values: Mapping[str, Any], *, version: str, samples: Mapping[str, Any]) -> list[SuiteFigure]:
    """Return the figures of one task: entries `metric,filter` that are numbers."""
    figures = []
    for key, value in values.items():
        metric, comma, name = key.partition(",")
        if not comma or "_stderr" in metric or not _is_number(value):
            continue
        if not math.isfinite(value):
            raise DataError(f"{metric} of task {task} is {value}: the suite did not score its answers")
        errors = [values.get(f"{metric}_stderr{kind},{name}", "N/A") for kind in ("", "_clt")]
        figures.append(
            SuiteFigure(
                task=task,
                version=version,
                metric=metric,
                filter=name,
                value=float(value),
                stderr=next((float(error) for error in errors if _is_number(error) and math.isfinite(error)), None),
                num_samples=int(samples[task]["effective"]) if task in samples else None,
            )
        )
    return figures


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
