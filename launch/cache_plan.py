"""What a cache will hold, take and cost: figures of a run file, from its data and the teacher's configuration."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from launch.plan_config import PlanConfig
from launch.plan_cost import BreakEven, StageReading, TeacherSpeed, break_even, stage_readings, teacher_speed
from launch.run_config import RunConfig
from teacher_cache.cache_size import CacheSize, HeadShape, ShardShape, cache_size
from teacher_cache.codec import Layout
from teacher_cache.config import CacheConfig, Compression, RowCodec
from teacher_cache.data_statistics import DataStatistics, TokenCounts, measure_data, shard_shapes
from teacher_cache.errors import ConfigError
from teacher_cache.teacher_size import TeacherSize, load_local_processor, local_directory, teacher_size

GIVEN_ID_BYTES = 32
"""Length of the ids that rows without one get."""


@dataclass(frozen=True, kw_only=True)
class Storage:
    """What the cache takes with one codec and compression."""

    codec: RowCodec
    compression: Compression
    size: CacheSize


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """Everything that `cache plan` tells."""

    config: RunConfig
    statistics: DataStatistics
    teacher: TeacherSize
    storage: Storage
    alternatives: tuple[Storage, ...]
    """The other codecs and compressions."""
    speed: TeacherSpeed
    readings: tuple[StageReading, ...]
    break_even: BreakEven

    @property
    def samples(self) -> int:
        """Samples that will be stored."""
        return round(self.statistics.samples)

    @property
    def skipped(self) -> int:
        """Rows that will be left out."""
        return self.statistics.rows - self.samples

    @property
    def tokens(self) -> int:
        """Teacher tokens of all stored samples, image tokens included."""
        return round(self.statistics.counts.tokens)


def make_plan(config: RunConfig) -> CachePlan:
    """Return the plan of a run's cache.

    Raises:
        ConfigError: The data or the teacher's configuration is not at hand and not stated under `plan` either.
        DataError: No row of the data is a usable sample.
    """
    teacher = find_teacher_size(config)
    statistics = find_statistics(config)
    shapes = shard_shapes(statistics, samples_per_shard=config.cache.samples_per_shard)
    chosen = (config.cache.targets.codec, config.cache.build.compression)
    storages = {
        (codec, compression): store_with(config.cache, shapes, teacher=teacher, codec=codec, compression=compression)
        for codec in get_args(RowCodec)
        for compression in get_args(Compression)
    }
    size, tokens, samples = storages[chosen].size, statistics.counts.tokens, max(round(statistics.samples), 1)
    build = config.cache.build
    speed = teacher_speed(
        config.plan,
        parameters=teacher.parameters,
        gpus_per_replica=build.tensor_parallel_size * build.pipeline_parallel_size,
        num_replicas=build.num_replicas,
    )
    readings = stage_readings(
        config.students,
        config.train,
        samples=samples,
        tier_bytes=size.tier_bytes,
        tokens=tokens,
        step_time_s=config.plan.step_time_s,
    )
    return CachePlan(
        config=config,
        statistics=statistics,
        teacher=teacher,
        storage=storages.pop(chosen),
        alternatives=tuple(storages.values()),
        speed=speed,
        readings=tuple(readings),
        break_even=break_even(
            config.plan,
            speed=speed,
            tokens=tokens,
            samples=samples,
            total_bytes=size.total_bytes,
            readings=readings,
        ),
    )


def store_with(
    config: CacheConfig,
    shapes: Sequence[ShardShape],
    *,
    teacher: TeacherSize,
    codec: RowCodec,
    compression: Compression,
) -> Storage:
    """Return what the shards take with one codec and compression."""
    layout = Layout(
        dtype=config.teacher.dtype,
        codec=codec,
        compression=compression,
        hidden_size=teacher.hidden_size,
        topk=config.targets.topk,
    )
    head = HeadShape(vocab_size=teacher.vocab_size, hidden_size=teacher.hidden_size, has_bias=teacher.has_head_bias)
    return Storage(codec=codec, compression=compression, size=cache_size(config, shapes, layout=layout, head=head))


def find_teacher_size(config: RunConfig) -> TeacherSize:
    """Return the teacher's sizes as the run file states them, the others from its config.json.

    Raises:
        ConfigError: A size is stated nowhere.
    """
    plan, teacher = config.plan, config.cache.teacher
    stated = {name: getattr(plan, name) for name in ("hidden_size", "vocab_size", "parameters")}
    needed = ["hidden_size", "vocab_size", *(["parameters"] if plan.tokens_per_s_per_replica is None else [])]
    missing = [name for name in needed if stated[name] is None]
    if not missing:
        return TeacherSize(**stated)
    try:
        found = teacher_size(local_directory(teacher), trust_remote_code=teacher.trust_remote_code)
    except ConfigError as error:
        keys = ", ".join(f"`plan.{name}`" for name in missing)
        raise ConfigError(f"{error}; set {keys} in the run file, or correct `cache.teacher.model`") from error
    return dataclasses.replace(found, **{name: size for name, size in stated.items() if size is not None})


def find_statistics(config: RunConfig) -> DataStatistics:
    """Return the statistics that the run file states, or else those of its data.

    Raises:
        ConfigError: There is neither data nor a whole set of statistics, or no tokenizer for the data.
        DataError: No row of the data is a usable sample.
    """
    plan, cache = config.plan, config.cache
    stated = {name: getattr(plan, name) for name in ("samples", "question_tokens", "answer_tokens")}
    missing = ", ".join(f"`plan.{name}`" for name, value in stated.items() if value is None)
    if not missing:
        return stated_statistics(plan, question_fraction=cache.targets.question_fraction)
    if any(value is not None for value in stated.values()):
        raise ConfigError(f"statistics of the data are stated without {missing}; set all of them under `plan`, or none")
    if not Path(cache.data.path).is_file():
        raise ConfigError(f"no data file at {cache.data.path}; correct `cache.data.path`, or state {missing} instead")
    try:
        processor = load_local_processor(cache.teacher)
    except ConfigError as error:
        raise ConfigError(f"{error}; correct `cache.teacher.model`, or state {missing} instead") from error
    return measure_data(cache, processor=processor, most_rows=plan.sample_rows)


def stated_statistics(plan: PlanConfig, *, question_fraction: float) -> DataStatistics:
    """Return the statistics that a run file states.

    Raises:
        ConfigError: They contradict each other.
    """
    samples, question, answer = plan.samples, plan.question_tokens, plan.answer_tokens
    assert samples is not None
    assert question is not None
    assert answer is not None
    if question < max(plan.turns, plan.image_tokens):
        raise ConfigError(
            f"`plan.question_tokens` is {question:g}; expected at least `plan.image_tokens` ({plan.image_tokens:g}), "
            f"and one token before each of `plan.turns` ({plan.turns:g}) answers"
        )
    counts = TokenCounts(
        tokens=samples * (question + answer),
        answer_tokens=samples * answer,
        image_tokens=samples * plan.image_tokens,
        turns=samples * plan.turns,
    )
    return DataStatistics(
        rows=samples,
        sampled_rows=0,
        planned=samples,
        samples=samples,
        counts=counts,
        question_rows=question_fraction * counts.question_rows,
        tokens_error=0.0,
        id_bytes=GIVEN_ID_BYTES,
    )
