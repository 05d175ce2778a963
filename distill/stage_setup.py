"""What a stage is made of before its first step: its data, its identity, its model."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from distill.adapters import add_adapters
from distill.checkpoint import Record
from distill.config import Stage, StudentConfig, TrainConfig
from distill.data import JoinedData, join_cache
from distill.encoder import SampleReader, StudentEncoder
from distill.identity import run_identity, student_files_digest
from distill.live import TargetSource
from distill.order import SampleOrder
from distill.own_recalibrator import build_recalibrator, copy_student_blocks
from distill.processes import Processes
from distill.signals import Signals
from distill.stage_spec import StageSpec, stage_spec
from distill.stages import StageModel
from distill.student import packs
from distill.watchdog import Watchdog
from distill.zero import load_for_backend, whole
from recalibrator import Recalibrator
from teacher_cache.documents import parse_document
from teacher_cache.errors import ConfigError
from teacher_cache.manifest import fingerprint
from teacher_cache.sample_file import SampleTable
from teacher_cache.teacher_checkpoint import digest_files, weight_files

DONE = "DONE.json"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all stages of one student share."""

    cache: TargetSource
    data: SampleTable
    reader: SampleReader
    encoder: StudentEncoder
    student: StudentConfig
    train: TrainConfig
    base: Path
    output_dir: Path
    processes: Processes
    signals: Signals
    watchdog: Watchdog

    @property
    def stages(self) -> list[Stage]:
        """Stages that the student's method has."""
        return own_stages(self.student, self.train)

    def stage_dir(self, stage: Stage) -> Path:
        """Return the folder of one stage."""
        return self.output_dir / "training" / self.student.name / stage


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """One stage, set up."""

    spec: StageSpec
    data: JoinedData
    order: SampleOrder
    max_steps: int
    source: Path
    """Directory of the student's weights at the start."""
    record: Record
    """Of its checkpoints, but for step and state."""
    directory: Path


def own_stages(student: StudentConfig, train: TrainConfig) -> list[Stage]:
    """Return the configured stages that a student's method has: only genrecal has align."""
    return [stage for stage in train.stages if stage != "align" or student.method == "genrecal"]


def set_up_stage(job: Job, stage: Stage) -> StageRun:
    """Join a stage's data and say what decides its result."""
    config, train, student = job.train.stage(stage), job.train, job.student
    has_images = any(sample.has_images for sample in job.data.samples)
    spec = stage_spec(
        stage, method=student.method, train=train, has_images=has_images, with_adapters=student.lora is not None
    )
    packing = train.packing and packs(job.base, trust_remote_code=student.trust_remote_code)
    spec = replace(spec, packing=packing)
    data = join_cache(
        job.cache,
        job.data,
        encoder=job.encoder,
        spec=spec,
        max_samples=config.max_samples,
        reader=job.reader,
    )
    order = SampleOrder(
        num_samples=len(data.sample_ids), global_batch_size=config.global_batch_size, seed=train.seed, stage=stage
    )
    source, initial_weights = _initial_weights(job, stage)
    record = Record(
        step=0,
        identity=run_identity(
            student,
            train,
            stage=stage,
            cache=job.cache.targets_fingerprint,
            samples=fingerprint({id_: job.cache.sample_digest(id_) for id_ in data.sample_ids}),
            initial_weights=initial_weights,
            student_files=student_files_digest(job.base),
        ),
        layout={"backend": train.backend, "world_size": job.processes.world_size},
        origin={
            "student": str(job.base.resolve()),
            "dtype": student.dtype,
            "trust_remote_code": student.trust_remote_code,
            "lora": None if student.lora is None or stage == "align" else student.lora.model_dump(mode="json"),
        },
        state={},
    )
    return StageRun(
        spec=spec,
        data=data,
        order=order,
        max_steps=config.max_steps or order.steps_per_epoch,
        source=source,
        record=record,
        directory=job.stage_dir(stage),
    )


def build_model(job: Job, run: StageRun) -> StageModel:
    """Load what the stage starts from."""
    lora = None if run.spec.stage == "align" else job.student.lora
    # the export of a stage with adapters holds them merged, and rounded
    source = run.source if lora is None else job.base
    student = load_for_backend(
        source,
        stage=run.spec.stage,
        train=job.train,
        dtype=job.student.dtype,
        trust_remote_code=job.student.trust_remote_code,
        processes=job.processes,
    )
    if job.train.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    teacher_head = job.cache.teacher_head() if run.spec.needs_teacher_head else None
    recalibrator = None
    if run.spec.with_recalibrator:
        trained = None if run.source == job.base else run.source.parent / "recalibrator.safetensors"
        recalibrator = _load_recalibrator(job, student, trained=trained)
    if lora is not None:
        earlier = run.source.parent / "adapter"
        goes_on = run.source != job.base and earlier.is_dir()
        add_adapters(student, lora, seed=job.train.seed, weights=earlier if goes_on else None)
    return StageModel(run.spec, student=student, recalibrator=recalibrator, teacher_head=teacher_head)


def read_done(directory: Path) -> dict[str, Any] | None:
    """Return what the record of a finished stage says; None where it is not finished."""
    path = directory / DONE
    return parse_document(path.read_bytes(), where=str(path)) if path.exists() else None


def _initial_weights(job: Job, stage: Stage) -> tuple[Path, str]:
    """Return the directory that a stage starts from, and what identifies its content."""
    earlier = job.stages[: job.stages.index(stage)]
    if not earlier:
        return job.base, digest_files(weight_files(job.base))
    previous = job.stage_dir(earlier[-1])
    done = read_done(previous)
    if done is None:
        raise ConfigError(f"stage {stage} starts from {earlier[-1]}, which is not done in {previous}: run it first")
    return previous / "export", fingerprint(done["identity"])


def _load_recalibrator(job: Job, student: Any, *, trained: Path | None) -> Recalibrator:
    recalibrator = build_recalibrator(
        student.config.get_text_config(), teacher_hidden=job.cache.hidden_size, train=job.train
    ).to(getattr(torch, job.student.dtype))
    options = job.train.recalibrator
    if trained is not None:
        recalibrator.load_state_dict(load_file(trained))
    elif options.init_from_student:
        with whole(student.get_decoder().layers[-options.num_blocks :]):
            copy_student_blocks(recalibrator, student)
    return recalibrator
