"""What a run took, beside what was planned for it: accounting.json in the run's folder."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.console import format_bytes
from launch.run_config import RunConfig
from launch.software import gpus
from teacher_cache.config import BuildConfig
from teacher_cache.durable_files import replace_file
from teacher_cache.errors import GenrecalError

logger = logging.getLogger(__name__)

ACCOUNTING = "accounting.json"
HOUR_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What one step of a run took, all starts of it together."""

    step: str
    seconds: float
    devices: int
    """Processes that computed, each on a GPU where there are any."""
    gpu_hours: float
    """0 on a machine without GPUs."""


@dataclass(frozen=True, kw_only=True)
class CacheCost:
    """The cache as planned and as it is; None where a figure is not known."""

    planned_gpu_hours: float | None
    gpu_hours: float
    planned_bytes: int | None
    bytes: int


def account(configs: Sequence[RunConfig]) -> None:
    """Write accounting.json from the times that were kept, and log its sums."""
    config = configs[0]
    folder = Path(config.output_dir)
    rows = json.loads((folder / "timings.json").read_text(encoding="utf-8"))
    per_gpu = 1 if gpus() else 0
    steps = [_step_cost(row["step"], row["seconds"], configs=configs, per_gpu=per_gpu) for row in rows]
    cache = _cache_cost(config, gpu_hours=sum(step.gpu_hours for step in steps if step.step == "cache"))
    record = {"steps": [asdict(step) for step in steps], "cache": asdict(cache)}
    replace_file(folder / ACCOUNTING, (json.dumps(record, indent=2) + "\n").encode())
    logger.info(
        "took %.3g GPU-hours (%.3g hours of all processes); the cache %.3g of %s planned, %s of %s planned",
        sum(step.gpu_hours for step in steps),
        sum(step.seconds * step.devices for step in steps) / HOUR_S,
        cache.gpu_hours,
        "an unknown number" if cache.planned_gpu_hours is None else f"{cache.planned_gpu_hours:.3g}",
        format_bytes(cache.bytes),
        "an unknown number" if cache.planned_bytes is None else format_bytes(cache.planned_bytes),
    )


def _step_cost(step: str, seconds: float, *, configs: Sequence[RunConfig], per_gpu: int) -> StepCost:
    devices = 1
    kind, _, name = step.partition(" ")
    if kind in ("cache", "answers"):
        devices = _replica_devices(configs[0].cache.build)
    elif kind == "train":
        devices = next(
            (config.train.num_processes for config in configs if name in {student.name for student in config.students}),
            1,
        )
    return StepCost(step=step, seconds=seconds, devices=devices, gpu_hours=per_gpu * devices * seconds / HOUR_S)


def _replica_devices(build: BuildConfig) -> int:
    return build.num_replicas * build.tensor_parallel_size * build.pipeline_parallel_size


def _cache_cost(config: RunConfig, *, gpu_hours: float) -> CacheCost:
    from launch.cache_plan import make_plan
    from teacher_cache.storage import open_store

    try:
        plan = make_plan(config)
    except GenrecalError as error:
        logger.info("the cache could not be planned afterwards: %s", error)
        plan = None
    return CacheCost(
        planned_gpu_hours=None if plan is None else plan.speed.gpu_hours(plan.statistics.counts.tokens),
        gpu_hours=gpu_hours,
        planned_bytes=None if plan is None else plan.storage.size.total_bytes,
        bytes=sum(entry.size_bytes for entry in open_store(config.cache.uri).list("")),
    )
