"""What a cache costs and when it pays for itself, in GPU-hours: pure arithmetic over counts and assumptions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from distill.config import Method, Stage, TrainConfig
from distill.stage_spec import stage_spec
from distill.trainer import own_stages
from launch.plan_config import PlanConfig
from launch.run_students import RunStudent
from teacher_cache.schema import Tier

FLOPS_PER_PARAMETER: Final = 2
"""Multiply and add, per token of a forward pass."""
GB: Final = 1e9
TFLOP: Final = 1e12
HOUR_S: Final = 3600.0
TOKENS_PER_S: Final = 1000.0
"""Speed of training for which a bandwidth is given where the time of a step is not known."""


@dataclass(frozen=True, kw_only=True)
class TeacherSpeed:
    """How fast the teacher runs, and on how much."""

    tokens_per_s_per_replica: float
    gpus_per_replica: int
    replicas: int
    flops_per_token: float | None
    """None where the speed was measured and the parameters are not known."""
    is_measured: bool

    def gpu_hours(self, tokens: float) -> float:
        """Return the GPU-hours of running the teacher over some tokens."""
        return tokens / self.tokens_per_s_per_replica / HOUR_S * self.gpus_per_replica

    def wall_hours(self, tokens: float) -> float:
        """Return the hours that all replicas together take."""
        return tokens / (self.tokens_per_s_per_replica * self.replicas) / HOUR_S


@dataclass(frozen=True, kw_only=True)
class StageReading:
    """What one stage reads from the cache, for the students of whom that is the same."""

    students: tuple[str, ...]
    method: Method
    stage: Stage
    tiers: tuple[Tier, ...]
    samples: int
    """Samples that all optimizer steps take: the teacher forwards that a live teacher would run."""
    bytes_per_sample: float
    bytes_per_step: float
    bytes_per_s: float | None
    """At the assumed time of a step."""
    bytes_per_s_per_1000_tokens_per_s: float
    """For each 1,000 teacher tokens per second that training goes through."""


@dataclass(frozen=True, kw_only=True)
class StudentCost:
    """What the teacher costs one student, by the settings of its own training."""

    name: str
    samples: int
    """That all its stages take of the cache."""
    live_gpu_hours: float
    """With a teacher that runs in every step."""
    read_gpu_hours: float
    """Reading the cache instead."""


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """The cache against a teacher that runs in every step."""

    cache_gpu_hours: float
    """Running the teacher once, and keeping the cache."""
    by_student: tuple[StudentCost, ...]
    """Those that need the teacher."""
    live_gpu_hours_per_student: float
    """Their mean."""
    read_gpu_hours_per_student: float
    students: float | None
    """From how many students on the cache is cheaper; None when it never is."""
    epochs: float | None
    """The same in passes of one student over all samples."""


def teacher_speed(
    plan: PlanConfig, *, parameters: int | None, gpus_per_replica: int, num_replicas: int
) -> TeacherSpeed:
    """Return the measured speed of the teacher, or the one that its parameters allow.

    Args:
        plan: Peak, utilisation, and the measured speed if there is one.
        parameters: Of the whole teacher; needed where the speed was not measured.
        gpus_per_replica: That share one copy of the teacher, in tensor and in pipeline parallel.
        num_replicas: Copies of the teacher.
    """
    flops = None if parameters is None else float(FLOPS_PER_PARAMETER * parameters)
    speed = plan.tokens_per_s_per_replica
    if speed is None:
        assert flops is not None
        speed = gpus_per_replica * plan.gpu_peak_tflop_per_s * TFLOP * plan.utilisation / flops
    return TeacherSpeed(
        tokens_per_s_per_replica=speed,
        gpus_per_replica=gpus_per_replica,
        replicas=num_replicas,
        flops_per_token=flops,
        is_measured=plan.tokens_per_s_per_replica is not None,
    )


def stage_readings(
    students: Sequence[RunStudent],
    train: TrainConfig,
    *,
    samples: int,
    tier_bytes: Mapping[Tier, int],
    tokens: float,
    step_time_s: float | None,
) -> list[StageReading]:
    """Return what each stage that needs the teacher reads, once for all students of whom it is the same.

    Args:
        students: Their methods decide which stages need the teacher, and their own settings hold over the run's.
        train: The run's stages, steps and batch sizes.
        samples: Stored in the cache.
        tier_bytes: Of the whole cache.
        tokens: Teacher tokens of the whole cache.
        step_time_s: Seconds per optimizer step, if assumed.
    """
    names: dict[StageReading, list[str]] = {}
    for student in students:
        settings = student.settings(train)
        for stage in own_stages(student, settings):
            tiers = stage_spec(stage, method=student.method, train=settings, has_images=False).tiers
            if not tiers:
                continue
            per_sample = sum(tier_bytes[tier] for tier in tiers) / samples
            per_step = per_sample * settings.stage(stage).global_batch_size
            reading = StageReading(
                students=(),
                method=student.method,
                stage=stage,
                tiers=tiers,
                samples=stage_samples(settings, stage, samples=samples),
                bytes_per_sample=per_sample,
                bytes_per_step=per_step,
                bytes_per_s=None if step_time_s is None else per_step / step_time_s,
                bytes_per_s_per_1000_tokens_per_s=per_sample / (tokens / samples) * TOKENS_PER_S,
            )
            names.setdefault(reading, []).append(student.name)
    return [replace(reading, students=tuple(found)) for reading, found in names.items()]


def stage_samples(train: TrainConfig, stage: Stage, *, samples: int) -> int:
    """Return the samples that a stage's optimizer steps take: whole batches of one epoch unless steps are given."""
    config = train.stage(stage)
    used = min(samples, config.max_samples or samples)
    steps = config.max_steps or max(used // config.global_batch_size, 1)
    return steps * config.global_batch_size


def break_even(
    plan: PlanConfig,
    *,
    speed: TeacherSpeed,
    tokens: float,
    samples: int,
    total_bytes: int,
    readings: Sequence[StageReading],
) -> BreakEven:
    """Return how many students, or epochs, make the cache cheaper than a teacher that runs live in every step.

    A student stands for the mean of those that need the teacher. Reading counts as time of the GPU whose process reads.
    """
    cache_hours = speed.gpu_hours(tokens) + plan.storage_gpu_hours_per_tb * total_bytes / 1e12
    costs = []
    for name in dict.fromkeys(name for reading in readings for name in reading.students):
        own = [reading for reading in readings if name in reading.students]
        forwards = sum(reading.samples for reading in own)
        read_bytes = sum(reading.samples * reading.bytes_per_sample for reading in own)
        costs.append(
            StudentCost(
                name=name,
                samples=forwards,
                live_gpu_hours=speed.gpu_hours(forwards * tokens / samples),
                read_gpu_hours=read_bytes / (plan.read_gb_per_s_per_process * GB) / HOUR_S,
            )
        )
    count = max(len(costs), 1)
    live_hours = sum(cost.live_gpu_hours for cost in costs) / count
    read_hours = sum(cost.read_gpu_hours for cost in costs) / count
    pays_after = cache_hours / (live_hours - read_hours) if live_hours > read_hours else None
    epochs_each = sum(cost.samples for cost in costs) / count / samples
    return BreakEven(
        cache_gpu_hours=cache_hours,
        by_student=tuple(costs),
        live_gpu_hours_per_student=live_hours,
        read_gpu_hours_per_student=read_hours,
        students=pays_after,
        epochs=None if pays_after is None else pays_after * epochs_each,
    )
