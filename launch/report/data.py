"""Read what a run left in its folder, for the report. A missing part becomes None and a note, never an error."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from distill.config import STAGES
from distill.scoring import EvaluationResult, SampleRow, read_result, read_sample_rows
from launch.suites.results import RECORD, SuiteRecord, read_record
from teacher_cache.config import DataConfig
from teacher_cache.errors import CacheError, DataError
from teacher_cache.samples import read_samples
from teacher_cache.schema import Sample

logger = logging.getLogger(__name__)

BASELINES = ("untouched", "sft", "kd", "uld")


@dataclass(frozen=True, kw_only=True)
class StageLog:
    """What one stage of one training run logged."""

    student: str
    stage: str
    records: tuple[Mapping[str, Any], ...]
    """Lines of metrics.jsonl in order of ``global_step``."""
    folder: Path
    skipped_updates: tuple[Mapping[str, Any], ...] = ()
    """Lines of faults.jsonl."""
    last_line_at: str = ""
    """Time of the last line of metrics.jsonl, in UTC."""

    @property
    def is_done(self) -> bool:
        """Whether the stage is trained."""
        return (self.folder / "DONE.json").exists()


@dataclass(frozen=True, kw_only=True)
class CacheFacts:
    """Sizes and provenance of the teacher cache."""

    num_samples: int
    answer_tokens: int
    vocab_size: int
    tier_bytes: Mapping[str, int]
    provenance: Mapping[str, Any]
    fingerprint: str

    @property
    def full_logits_bytes(self) -> int:
        """Bytes of bfloat16 logits over the whole vocabulary at the same answer tokens."""
        return 2 * self.answer_tokens * self.vocab_size


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Everything that the report shows, read from the run's folder."""

    run_dir: Path
    results: Mapping[str, Any]
    students: tuple[str, ...]
    evaluations: Mapping[str, EvaluationResult]
    stage_logs: tuple[StageLog, ...]
    cache: CacheFacts | None
    samples: tuple[Sample, ...]
    rows: tuple[SampleRow, ...]
    """Reference and further columns of each sample, in the same order."""
    timings: Mapping[str, float]
    """Seconds per step, in order."""
    run_files: Mapping[str, str]
    """Text of each run file by name."""
    expected_stages: tuple[tuple[str, str], ...] = ()
    """Student and stage of all that the run files train."""
    expected_evaluations: tuple[str, ...] = ()
    """Names of the trained students that the run files score."""
    suites: SuiteRecord = field(default_factory=SuiteRecord)
    """Published benchmarks that students have been through."""
    notes: tuple[str, ...] = field(default=())
    """What was looked for and not found."""

    def variants(self, student: str) -> dict[str, str]:
        """Return the evaluation name per kind of model at hand: untouched, sft, kd, uld, distilled."""
        names = {kind: f"{student}-{kind}" for kind in BASELINES} | {"distilled": student}
        return {kind: name for kind, name in names.items() if name in self.evaluations}

    @property
    def is_finished(self) -> bool:
        """Whether everything that the run files ask for is trained and scored; False without a run file."""
        done = {(log.student, log.stage) for log in self.stage_logs if log.is_done}
        trained = bool(self.expected_stages) and done >= set(self.expected_stages)
        return trained and self.evaluations.keys() >= set(self.expected_evaluations)


def read_run(run_dir: Path) -> RunData:
    """Read a run's folder; see ``launch.report`` for its layout.

    Raises:
        DataError: There is no such folder, or a file in it holds something else than it should.
    """
    if not run_dir.is_dir():
        raise DataError(f"no run folder at {run_dir}: give the output_dir of a run")
    notes: list[str] = []
    run_files = {path.name: path.read_text(encoding="utf-8") for path in sorted(run_dir.glob("run-files/*.yaml"))}
    configs = [yaml.safe_load(text) for text in run_files.values()]
    results = _read_json(run_dir / "results.json", notes=notes) or {"students": {}}
    evaluations = {path.stem: read_result(path) for path in sorted(run_dir.glob("evaluation/*.json"))}
    if not evaluations:
        notes.append("no evaluation/*.json: run `genrecal eval`")
    samples, rows = _read_held_out(_data_path(run_dir, configs), notes=notes) if evaluations else ((), ())
    stage_logs = _read_stage_logs(run_dir, notes=notes)
    return RunData(
        run_dir=run_dir,
        results=results,
        students=tuple(dict.fromkeys([*results["students"], *_distilled(configs)])) or _trained(stage_logs),
        evaluations=evaluations,
        stage_logs=stage_logs,
        cache=_read_cache(_cache_uri(run_dir, configs), notes=notes),
        samples=samples,
        rows=rows,
        timings={row["step"]: float(row["seconds"]) for row in _read_json(run_dir / "timings.json", notes=notes) or []},
        run_files=run_files,
        expected_stages=_expected_stages(configs),
        expected_evaluations=tuple(
            student["name"] for config in configs if config.get("evaluation") for student in config.get("students", ())
        ),
        suites=read_record(run_dir / RECORD),
        notes=tuple(notes),
    )


def _distilled(configs: list[dict[str, Any]]) -> list[str]:
    """Return the students of the run files that are distilled, not those of their baselines."""
    students = [student for config in configs for student in config.get("students", ())]
    return [student["name"] for student in students if student.get("method", "genrecal") == "genrecal"]


def _trained(stage_logs: tuple[StageLog, ...]) -> tuple[str, ...]:
    """Return the students that a folder without a run file trains, baselines left out."""
    suffixes = tuple(f"-{kind}" for kind in BASELINES)
    return tuple(dict.fromkeys(log.student for log in stage_logs if not log.student.endswith(suffixes)))


def _expected_stages(configs: list[dict[str, Any]]) -> tuple[tuple[str, str], ...]:
    expected = []
    for config in configs:
        stages = config.get("train", {}).get("stages", STAGES)
        for student in config.get("students", ()):
            has_align = student.get("method", "genrecal") == "genrecal"
            expected += [(student["name"], stage) for stage in stages if stage != "align" or has_align]
    return tuple(dict.fromkeys(expected))


def _read_json(path: Path, *, notes: list[str]) -> Any:
    if not path.exists():
        notes.append(f"no {path.name}")
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def _cache_uri(run_dir: Path, configs: list[dict[str, Any]]) -> str:
    own = run_dir / "cache"
    return str(own) if own.exists() else next((config["cache"]["uri"] for config in configs), str(own))


def _data_path(run_dir: Path, configs: list[dict[str, Any]]) -> str:
    own = run_dir / "data" / "test.parquet"
    given = (config["evaluation"]["data"] for config in configs if config.get("evaluation"))
    return str(own) if own.exists() else next(given, str(own))


def _read_stage_logs(run_dir: Path, *, notes: list[str]) -> tuple[StageLog, ...]:
    logs = []
    for path in sorted(run_dir.glob("training/*/*/metrics.jsonl")):
        stage, student = path.parent.name, path.parent.parent.name
        by_step: dict[int, dict[str, Any]] = {}
        for record in _read_lines(path):
            # a killed run may have logged some steps twice: the later line counts
            if "global_step" in record:
                step = int(record["global_step"])
                by_step[step] = by_step.get(step, {}) | record
        written = datetime.fromtimestamp(path.stat().st_mtime, tz=UTC)
        logs.append(
            StageLog(
                student=student,
                stage=stage,
                records=tuple(by_step[step] for step in sorted(by_step)),
                folder=path.parent,
                skipped_updates=tuple(_read_lines(path.with_name("faults.jsonl"))),
                last_line_at=f"{written:%d %b %H:%M:%S}",
            )
        )
    if not logs:
        notes.append("no training/<student>/<stage>/metrics.jsonl: nothing has been trained")
    order: dict[str, int] = {stage: index for index, stage in enumerate(STAGES)}
    return tuple(sorted(logs, key=lambda log: (log.student, order.get(log.stage, len(order)))))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines that may be written to now; none where there is no file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    try:
        # what follows the last line break is a line still being written
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    except json.JSONDecodeError as error:
        raise DataError(f"{path} holds a line that is not JSON: {error}") from error


def _read_cache(uri: str, *, notes: list[str]) -> CacheFacts | None:
    from teacher_cache.reader import open_cache

    try:
        cache = open_cache(uri)
        return CacheFacts(
            num_samples=len(cache.sample_ids),
            answer_tokens=sum(cache.answer_tokens(sample_id) for sample_id in cache.sample_ids),
            vocab_size=cache.vocab_size,
            tier_bytes=cache.tier_bytes(),
            provenance=cache.provenance,
            fingerprint=cache.fingerprint,
        )
    except CacheError as error:
        notes.append(f"the cache was not read: {error}")
        return None


def _read_held_out(path: str, *, notes: list[str]) -> tuple[tuple[Sample, ...], tuple[SampleRow, ...]]:
    if not Path(path).is_file():
        notes.append(f"no held-out data at {path}: examples are left out")
        return (), ()
    config = DataConfig(path=path, max_skipped_samples=2**31)
    samples = read_samples(config).samples
    return samples, tuple(read_sample_rows(config, samples=samples))
