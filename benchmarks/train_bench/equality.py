"""Losses of runs from the cache against those of the same runs with the same teacher engine live."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cache_bench.figures import Figure
from random_inputs import create_models

from distill.config import Method, Stage, TrainConfig
from distill.live import LiveTeacher, TargetSource
from distill.trainer import train_student
from teacher_cache.config import BuildConfig, CacheConfig
from teacher_cache.spot_check import TOLERANCE
from train_bench.inputs import Inputs, capture, student_config
from train_bench.settings import QUICK

SECTION = "cached = live"
BAR = 1e-6


@dataclass(frozen=True, kw_only=True)
class Run:
    """One method, with the stages of it that read the teacher."""

    method: Method
    stages: tuple[Stage, ...]
    changes: dict[str, Any]
    """In the settings."""


RUNS = {
    "genrecal": Run(method="genrecal", stages=("align", "distill"), changes={}),
    "genrecal with stand-ins": Run(
        method="genrecal", stages=("align", "distill"), changes={"recalibrator": {"student_answer_fraction": 0.5}}
    ),
    "kd from top-k": Run(method="kd", stages=("distill",), changes={"baselines": {"source": "topk"}}),
    "kd from rows": Run(method="kd", stages=("distill",), changes={"baselines": {"source": "rows"}}),
    "uld from top-k": Run(method="uld", stages=("distill",), changes={"baselines": {"source": "topk"}}),
    "uld from rows": Run(method="uld", stages=("distill",), changes={"baselines": {"source": "rows"}}),
}
STAGE = {"global_batch_size": 4, "micro_batch_size": 2, "max_steps": 3, "learning_rate": 1e-3}


def measure(inputs: Inputs, folder: Path) -> Iterator[Figure]:
    """Yield the largest relative difference for each engine, and of one engine's cache from the other live."""
    folder = folder / "small"
    create_models(folder, {"teacher": QUICK.teacher, "other": next(iter(QUICK.students.values()))})
    teacher = inputs.cache.teacher.model_copy(update={"model": str(folder / "teacher")})
    config = inputs.cache.model_copy(
        update={
            "teacher": teacher,
            "uri": str(folder / "cache"),
            "data": inputs.cache.data.model_copy(update={"max_samples": QUICK.num_samples}),
        }
    )
    small, settings = capture(config), inputs.settings
    runs = {name: RUNS[name] for name in settings.equality_runs}
    yield _figure(
        "transformers",
        _differences(config, small.live, folder=folder / "transformers", runs=runs),
        bar=BAR,
        json_name="cached_vs_live_loss_relative_difference",
    )
    if not settings.with_vllm or find_spec("vllm") is None:
        return
    build = BuildConfig(engine="vllm", max_batched_tokens=2048, kv_cache_gib=0.125)
    by_vllm = config.model_copy(update={"uri": str(folder / "vllm-cache"), "build": build})
    engine = capture(by_vllm)
    genrecal = {"genrecal": RUNS["genrecal"]}
    yield _figure("vLLM", _differences(by_vllm, engine.live, folder=folder / "vllm", runs=genrecal), bar=BAR)
    yield _figure(
        "a cache of vLLM, transformers live",
        _differences(by_vllm, small.live, folder=folder / "other", runs=genrecal),
        bar=TOLERANCE["float32"],
    )
    engine.live.teacher.close()


def _differences(config: CacheConfig, live: LiveTeacher, *, folder: Path, runs: dict[str, Run]) -> dict[str, float]:
    """Return the largest relative difference of any loss of any step, by stage and run."""
    found = {}
    for name, run in runs.items():
        model = "teacher" if run.method == "kd" else "other"
        sides: list[dict[Stage, list[float]]] = []
        for side, targets in (("cached", None), ("live", live)):
            sides.append(_losses(config, run, model=model, folder=folder / side / name, targets=targets))
        for stage in run.stages:
            pairs = zip(*(side[stage] for side in sides), strict=True)
            found[f"{name}, {stage}"] = max(abs(cached - other) / abs(other) for cached, other in pairs)
    return found


def _losses(
    config: CacheConfig, run: Run, *, model: str, folder: Path, targets: TargetSource | None
) -> dict[Stage, list[float]]:
    student = student_config("student", Path(config.teacher.model).with_name(model))
    settings = {**dict.fromkeys(run.stages, STAGE), "stages": run.stages, "backend": "torch", **run.changes}
    train_student(
        cache=config,
        student=student.model_copy(update={"method": run.method}),
        train=TrainConfig.model_validate(settings),
        output_dir=folder,
        targets=targets,
    )
    paths = {stage: folder / "training" / student.name / stage / "metrics.jsonl" for stage in run.stages}
    return {stage: _logged_losses(path.read_text().splitlines()) for stage, path in paths.items()}


def _logged_losses(lines: Sequence[str]) -> list[float]:
    records = [json.loads(line) for line in lines]
    return [
        value
        for record in records
        for name, value in record.items()
        if name.startswith("train/") and name.endswith(("loss", "_ce")) and value
    ]


def _figure(engine: str, differences: dict[str, float], *, bar: float, json_name: str = "") -> Figure:
    worst = max(differences, key=lambda name: differences[name])
    return Figure(
        section=SECTION,
        name=f"{engine}: largest relative difference of a loss",
        value=differences[worst],
        unit="",
        bar=bar,
        at_most=True,
        note=f"float32 rows; {len(differences)} stages of {STAGE['max_steps']} steps: {worst}",
        json_name=json_name,
    )
