"""What the measurements share: data, a teacher, students, and a cache whose capture is timed."""

import time
from dataclasses import dataclass
from pathlib import Path

from random_inputs import create_models, write_data

from distill.config import StudentConfig
from distill.live import LiveTeacher
from teacher_cache.build_plan import open_builder
from teacher_cache.config import BuildConfig, CacheConfig, DataConfig, TargetsConfig, TeacherConfig
from teacher_cache.samples import read_samples
from teacher_cache.shard_worker import ShardWorker
from teacher_cache.teacher import TransformersTeacher
from train_bench.settings import Settings

MAX_LENGTH = 2048


@dataclass(frozen=True, kw_only=True)
class Captured:
    """A cache that was built, and the engine that built it."""

    live: LiveTeacher
    start_s: float
    """Loading the teacher."""
    seconds: float
    """Everything after that: encoding, teacher, checks, writing, commit."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that is measured on; all in float32."""

    settings: Settings
    cache: CacheConfig
    captured: Captured
    students: dict[str, StudentConfig]


def make_inputs(folder: Path, settings: Settings) -> Inputs:
    """Write data and random models, and build the cache with the teacher in plain transformers."""
    create_models(folder, {"teacher": settings.teacher, **settings.students})
    data = write_data(folder, num_samples=settings.num_samples, words=settings.words, image_side=settings.image_side)
    config = CacheConfig(
        uri=str(folder / "cache"),
        teacher=TeacherConfig(model=str(folder / "teacher"), dtype="float32"),
        data=DataConfig(path=str(data), max_length=MAX_LENGTH),
        targets=TargetsConfig(topk=64),
        samples_per_shard=settings.num_samples,
        build=BuildConfig(engine="transformers"),
    )
    return Inputs(
        settings=settings,
        cache=config,
        captured=capture(config),
        students={name: student_config(name, folder / name) for name in settings.students},
    )


def capture(config: CacheConfig) -> Captured:
    """Build a cache in this process."""
    samples = read_samples(config.data)
    start = time.perf_counter()
    worker = ShardWorker(config, writer=open_builder(config, samples), identity={}, log_file=None)
    started = time.perf_counter()
    for shard in worker.writer.missing_shards():
        list(worker.build(shard.shard_id, samples.samples))
    assert worker.writer.complete()
    return Captured(
        live=LiveTeacher(worker.teacher, config=config, samples=samples.samples),
        start_s=started - start,
        seconds=time.perf_counter() - started,
    )


def student_config(name: str, model: Path) -> StudentConfig:
    """Return a student in float32."""
    return StudentConfig(name=name, model=str(model), dtype="float32", max_length=MAX_LENGTH)


def num_parameters(inputs: Inputs) -> int:
    """Return the size of the teacher."""
    teacher = inputs.captured.live.teacher
    assert isinstance(teacher, TransformersTeacher)
    return sum(weight.numel() for weight in teacher.model.parameters())
