"""What the measurements share: data, a teacher, students, and a cache whose capture is timed."""

import io
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet

from distill.config import StudentConfig
from distill.live import LiveTeacher
from launch.demo.models import create_model_directory
from teacher_cache.build_plan import open_builder
from teacher_cache.config import BuildConfig, CacheConfig, DataConfig, TargetsConfig, TeacherConfig
from teacher_cache.samples import read_samples
from teacher_cache.shard_worker import ShardWorker
from teacher_cache.teacher import TransformersTeacher
from train_bench.settings import Settings

WORDS = ("which", "digit", "is", "the", "largest", "in", "top", "row", "and", "how", "many", "are", "greater", "than")
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
    models = {"teacher": settings.teacher, **settings.students}
    for seed, (name, spec) in enumerate(models.items()):
        create_model_directory(spec, folder / name, corpus=[" ".join(WORDS)] * 4, seed=seed)
    config = CacheConfig(
        uri=str(folder / "cache"),
        teacher=TeacherConfig(model=str(folder / "teacher"), dtype="float32"),
        data=DataConfig(path=str(_write_data(folder, settings)), max_length=MAX_LENGTH),
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


def _write_data(folder: Path, settings: Settings) -> Path:
    rng = np.random.default_rng(0)
    side = settings.image_side
    rows = []
    for number in range(settings.num_samples):
        buffer = io.BytesIO()
        PIL.Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(buffer, format="PNG")
        question, answer = (
            " ".join(rng.choice(WORDS, size=int(rng.integers(count // 2, 3 * count // 2)))) for count in settings.words
        )
        messages = [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": answer}]
        rows.append({"id": f"sample-{number:05}", "messages": messages, "images": [{"bytes": buffer.getvalue()}]})
    path = folder / "data.parquet"
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path
