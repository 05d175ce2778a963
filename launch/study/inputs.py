"""What a study's runs share: data, teachers, untouched students, caches. Each part is made once and kept."""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch.study.config import StudyConfig, StudyStudent, StudyTeacher
from launch.study.grid import Cell, plan_cells
from teacher_cache.config import CacheConfig, DataConfig, TeacherConfig
from teacher_cache.errors import ConfigError

if TYPE_CHECKING:
    from launch.demo.models import ModelSpec

logger = logging.getLogger(__name__)

MAX_LENGTH = 512
"""Longest conversation in tokens of any model; digit grids stay far below it."""
CAPTURE_PROBE = 64
"""Samples whose forward pass through the teacher is counted."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Where everything lies that a run reads."""

    config: StudyConfig

    @property
    def folder(self) -> Path:
        """Return the study's folder."""
        return Path(self.config.output_dir)

    @property
    def train_file(self) -> Path:
        """Return the training conversations."""
        return self.folder / "data" / "train.parquet"

    @property
    def test_file(self) -> Path:
        """Return the held-out questions."""
        return self.folder / "data" / "test.parquet"

    def teacher(self, name: str) -> Path:
        """Return a teacher's directory."""
        return self.folder / "teachers" / name

    def student(self, name: str) -> Path:
        """Return an untouched student's directory."""
        return self.folder / "untouched" / name

    def cache(self, teacher: str, name: str) -> CacheConfig:
        """Return the cache of a teacher by the name of its targets."""
        return CacheConfig(
            uri=str(self.folder / "caches" / f"{teacher}-{name}"),
            teacher=TeacherConfig(model=str(self.teacher(teacher)), dtype="float32"),
            data=DataConfig(path=str(self.train_file), max_length=MAX_LENGTH),
            targets=self.config.caches[name],
            samples_per_shard=self.config.samples_per_shard,
            build=self.config.build,
        )

    def capture_file(self, teacher: str, name: str) -> Path:
        """Return where the FLOPs of a cache's capture are kept."""
        return self.folder / "caches" / f"{teacher}-{name}.capture.json"

    def scores_file(self, teacher: str) -> Path:
        """Return a teacher's own scores."""
        return self.folder / "teachers" / f"{teacher}.scores.npz"

    def cache_of(self, cell: Cell) -> tuple[str, str]:
        """Return teacher and name of the cache that a run reads: its samples alone where no teacher matters."""
        return cell.teacher or self.config.teachers[0].name, cell.arm.cache

    def caches(self) -> list[tuple[str, str]]:
        """Return teacher and name of every cache that some run reads, in the order of the runs."""
        trained = (cell for cell in plan_cells(self.config) if cell.arm.method != "untouched")
        return list(dict.fromkeys(self.cache_of(cell) for cell in trained))


def check_same_inputs(config: StudyConfig) -> None:
    """Remember what a study's folder was made with, or refuse another.

    Raises:
        ConfigError: The folder holds data or models of other settings.
    """
    path = Path(config.output_dir) / "inputs.json"
    asked = config.model_dump(mode="json", include={"data", "teachers", "students", "caches", "samples_per_shard"})
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asked, indent=2) + "\n")
        return
    made = json.loads(path.read_text())
    for key, value in asked.items():
        old = made.get(key)
        grown = _by_name(old, key=key).items() <= _by_name(value, key=key).items()
        if old != value and not (key in ("teachers", "students", "caches") and grown):
            raise ConfigError(
                f"{config.output_dir} was made with other `{key}`: {json.dumps(old)}, the study file says "
                f"{json.dumps(value)}. Choose another output_dir, or add new ones under new names"
            )
    path.write_text(json.dumps(asked, indent=2) + "\n")


def _by_name(values: object, *, key: str) -> dict[str, str]:
    if isinstance(values, list):
        return {value["name"]: json.dumps(value) for value in values}
    return {name: json.dumps(value) for name, value in values.items()} if isinstance(values, dict) else {key: "made"}


def make_data(config: StudyConfig) -> None:
    """Compose the conversations."""
    from launch.demo.digits import generate_digit_vqa

    inputs, data = Inputs(config=config), config.data
    if not inputs.test_file.exists():
        generate_digit_vqa(
            inputs.test_file.parent,
            num_train=data.num_train,
            num_test=data.num_test,
            seed=data.seed,
            max_turns=data.max_turns,
        )


def missing_models(config: StudyConfig) -> Iterator[str]:
    """Yield the names of models that are not made yet."""
    inputs = Inputs(config=config)
    yield from (teacher.name for teacher in config.teachers if not inputs.teacher(teacher.name).exists())
    yield from (student.name for student in config.students if not inputs.student(student.name).exists())


def make_model(config: StudyConfig, name: str) -> None:
    """Make one teacher or untouched student; a killed call goes on where it was."""
    from launch.demo.make_models import TEACHER, TEACHER_STEPS, copy_trained_teacher, train_model

    inputs = Inputs(config=config)
    teacher = next((one for one in config.teachers if one.name == name), None)
    path = inputs.student(name) if teacher is None else inputs.teacher(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    model: StudyTeacher | StudyStudent = teacher or next(one for one in config.students if one.name == name)
    if teacher is not None and teacher.steps == TEACHER_STEPS:
        copy_trained_teacher(path)
        return
    train_model(
        TEACHER if isinstance(model, StudyTeacher) else student_spec(model),
        path,
        name=name,
        steps=model.steps,
        vision_steps=model.vision_steps,
        data_seed=config.data.seed,
        max_digits=getattr(model, "max_digits", None),
        half_precision=False,
    )


def student_spec(student: StudyStudent) -> "ModelSpec":
    """Return the shape of a student: the demo's, or the teacher's family and tokenizer in the students' size."""
    from launch.demo.make_models import INTERNVL, STUDENTS, TEACHER

    sizes = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
    spec = (
        replace(TEACHER, **{name: getattr(INTERNVL, name) for name in sizes})
        if student.family == "qwen2-vl"
        else STUDENTS[student.family]
    )
    return spec if student.patch_size is None else replace(spec, patch_size=student.patch_size)


def build_cache(config: StudyConfig, teacher: str, name: str) -> None:
    """Build a cache, or what is missing of it, and count what its capture cost."""
    from teacher_cache.build import build_cache as build

    inputs = Inputs(config=config)
    build(inputs.cache(teacher, name), log_dir=inputs.folder / "logs" / f"cache-{teacher}-{name}")
    path = inputs.capture_file(teacher, name)
    if not path.exists():
        cost = count_capture(inputs.cache(teacher, name))
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(cost), indent=2) + "\n")
        partial.replace(path)


@dataclass(frozen=True, kw_only=True)
class CaptureCost:
    """What a cache took."""

    flops: float
    """Of the teacher's forward pass over all samples."""
    num_samples: int
    tier_bytes: dict[str, int]


def count_capture(config: CacheConfig) -> CaptureCost:
    """Count the teacher's FLOPs on some samples, and carry them over to all by their tokens."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from distill.student import last_hidden_state, load_student
    from teacher_cache import open_cache
    from teacher_cache.chat import encode_conversation, load_processor
    from teacher_cache.samples import read_samples

    cache = open_cache(config.uri)
    model = load_student(Path(config.teacher.model), dtype="float32")
    processor = load_processor(config.teacher.model)
    samples = read_samples(config.data).samples[:CAPTURE_PROBE]
    tokens = 0
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        for sample in samples:
            encoded = encode_conversation(processor, sample, max_length=MAX_LENGTH)
            ids = torch.from_numpy(encoded.token_ids).long()[None]
            mask = torch.ones_like(ids)
            last_hidden_state(model, ids, attention_mask=mask, model_inputs=encoded.model_inputs)
            tokens += ids.numel()
    all_tokens = sum(cache.num_tokens(sample_id) for sample_id in cache.sample_ids)
    answer_tokens = sum(cache.answer_tokens(sample_id) for sample_id in cache.sample_ids)
    head = 2 * cache.vocab_size * cache.hidden_size * answer_tokens
    return CaptureCost(
        flops=counter.get_total_flops() / tokens * all_tokens + head,
        num_samples=len(cache),
        tier_bytes=dict(cache.tier_bytes()),
    )


def read_capture(path: Path) -> CaptureCost:
    """Read what ``build_cache`` kept."""
    return CaptureCost(**json.loads(path.read_text()))
