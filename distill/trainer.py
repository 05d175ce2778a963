"""Train one student through its stages; resumes by itself and skips what is done."""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from distill.adapters import add_adapters
from distill.checkpoint import Record, require_same_run, write_durably
from distill.config import STAGES, Stage, StudentConfig, TrainConfig
from distill.data import JoinedData, join_cache
from distill.encoder import SampleReader, StudentEncoder
from distill.export import export_adapters, export_recalibrator, export_student
from distill.identity import run_identity, student_files_digest
from distill.live import TargetSource
from distill.loop import run_steps
from distill.order import SampleOrder
from distill.processes import Processes
from distill.signals import Signals, noted_signals
from distill.stage_spec import StageSpec, stage_spec
from distill.stages import StageModel
from distill.step import Loop
from distill.student import load_student, packs, resolve_model
from distill.watchdog import Watchdog
from distill.watching import watch_stage
from distill.zero import check_before_start, launched_processes, make_engine
from recalibrator import Recalibrator, RecalibratorConfig
from teacher_cache import open_cache
from teacher_cache.chat import load_processor
from teacher_cache.config import CacheConfig
from teacher_cache.documents import encode_document, parse_document
from teacher_cache.durable_files import remove
from teacher_cache.errors import ConfigError
from teacher_cache.manifest import fingerprint
from teacher_cache.sample_file import SampleTable, scan_samples
from teacher_cache.teacher_checkpoint import digest_files, weight_files

logger = logging.getLogger(__name__)

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


def train_student(
    *,
    cache: CacheConfig,
    student: StudentConfig,
    train: TrainConfig,
    output_dir: Path,
    stages: Sequence[Stage] | None = None,
    targets: TargetSource | None = None,
) -> None:
    """Train one student, inside the processes that a launcher started or alone.

    Args:
        cache: The teacher cache, and the data that it was built from.
        student: The student and its method.
        train: Stages and settings.
        output_dir: Run folder; results go to ``training/<student>/<stage>/`` and ``students/<student>/``.
        stages: Stages to run now; by default all that the method has. Earlier ones must be done.
        targets: Where the teacher's targets come from; by default the cache.

    Raises:
        SystemExit: 128 + n after signal n, once a checkpoint is written.
    """
    chosen = choose_stages(stages, student=student, train=train)
    check_before_start(train, stages=chosen, dtype=student.dtype)
    with (
        launched_processes(backend=train.backend, num_processes=train.num_processes) as processes,
        noted_signals() as signals,
        Watchdog() as watchdog,
    ):
        watchdog.expect(f"{student.name}: the start", within_s=train.slow_timeout_s)
        base = resolve_model(student.model, revision=student.revision)
        processor = load_processor(str(base), trust_remote_code=student.trust_remote_code)
        job = Job(
            cache=open_cache(cache.uri) if targets is None else targets,
            data=scan_samples(cache.data),
            reader=SampleReader(cache.data),
            encoder=StudentEncoder(processor, config=student, memory_mib=train.encoding_cache_mib),
            student=student,
            train=train,
            base=base,
            output_dir=output_dir,
            processes=processes,
            signals=signals,
            watchdog=watchdog,
        )
        trained = [_run_stage(job, stage) for stage in chosen]
        if chosen[-1] == job.stages[-1] and (any(trained) or not _published(job).exists()):
            _publish(job)


def own_stages(student: StudentConfig, train: TrainConfig) -> list[Stage]:
    """Return the configured stages that a student's method has: only genrecal has align."""
    return [stage for stage in train.stages if stage != "align" or student.method == "genrecal"]


def choose_stages(stages: Sequence[Stage] | None, *, student: StudentConfig, train: TrainConfig) -> list[Stage]:
    """Return the stages to run now, in order.

    Raises:
        ConfigError: The student has no such stage.
    """
    own = own_stages(student, train)
    chosen = own if stages is None else [stage for stage in STAGES if stage in stages]
    absent = [stage for stage in chosen if stage not in own]
    if absent or not chosen:
        raise ConfigError(
            f"student {student.name} (method {student.method}) has no stage {', '.join(absent) or 'left'}: "
            f"its stages are {', '.join(own) or 'none'}"
        )
    return chosen


def _run_stage(job: Job, stage: Stage) -> bool:
    """Train a stage unless it is done; return whether it was trained."""
    label = f"{job.student.name} {stage}"
    job.watchdog.expect(f"{label}: the set-up", within_s=job.train.slow_timeout_s)
    run = _set_up(job, stage)
    _stop_if_asked(job, label)
    done = _read_done(run.directory)
    if done is not None:
        require_same_run(stored=done["identity"], asked=run.record.identity, where=run.directory)
        logger.info("%s is done: skipped", label)
        return False
    run.directory.mkdir(parents=True, exist_ok=True)
    model = _build_model(job, run)
    engine = make_engine(model, stage=stage, train=job.train, dtype=job.student.dtype, processes=job.processes)
    try:
        run_steps(
            Loop(
                engine=engine,
                data=run.data,
                order=run.order,
                config=job.train.stage(stage),
                train=job.train,
                max_steps=run.max_steps,
                record=run.record,
                directory=run.directory,
                label=label,
                max_skipped_samples=job.student.max_skipped_samples,
                processes=job.processes,
                signals=job.signals,
                watchdog=job.watchdog,
                watching=watch_stage(
                    stage,
                    student=job.student,
                    train=job.train,
                    model=engine.model,
                    base=job.base,
                    output_dir=job.output_dir,
                    processes=job.processes,
                ),
            )
        )
        export_student(
            engine, run.directory / "export", source=job.base, dtype=job.student.dtype, processes=job.processes
        )
        export_recalibrator(engine, run.directory / "recalibrator.safetensors", processes=job.processes)
        if job.student.lora is not None:
            export_adapters(
                engine,
                run.directory / "adapter",
                config=job.student.lora,
                base=job.student.model,
                processes=job.processes,
            )
        report = engine.partition_report()
    finally:
        engine.close()
    if job.processes.rank == 0:
        body = {
            "identity": run.record.identity,
            "layout": run.record.layout,
            "steps": run.max_steps,
            "partition": asdict(report),
        }
        write_durably(run.directory / DONE, encode_document(body))
    job.processes.barrier()
    return True


def _stop_if_asked(job: Job, label: str) -> None:
    """End all processes together when a signal came to any of them while there was no step to finish."""
    if job.processes.sum([float(job.signals.received > 0)])[0]:
        logger.info("%s stopped by a signal before its first step; nothing is lost", label)
        raise SystemExit(128 + job.signals.number)


def _set_up(job: Job, stage: Stage) -> StageRun:
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


def _initial_weights(job: Job, stage: Stage) -> tuple[Path, str]:
    """Return the directory that a stage starts from, and what identifies its content."""
    earlier = job.stages[: job.stages.index(stage)]
    if not earlier:
        return job.base, digest_files(weight_files(job.base))
    previous = job.stage_dir(earlier[-1])
    done = _read_done(previous)
    if done is None:
        raise ConfigError(f"stage {stage} starts from {earlier[-1]}, which is not done in {previous}: run it first")
    return previous / "export", fingerprint(done["identity"])


def _build_model(job: Job, run: StageRun) -> StageModel:
    lora = None if run.spec.stage == "align" else job.student.lora
    # the export of a stage with adapters holds them merged, and rounded
    source = run.source if lora is None else job.base
    student = load_student(source, dtype=job.student.dtype, trust_remote_code=job.student.trust_remote_code)
    if job.train.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    teacher_head = job.cache.teacher_head() if run.spec.needs_teacher_head else None
    recalibrator = None
    if run.spec.with_recalibrator:
        trained = None if run.source == job.base else run.source.parent / "recalibrator.safetensors"
        recalibrator = _build_recalibrator(job, student, trained=trained)
    if lora is not None:
        earlier = run.source.parent / "adapter"
        goes_on = run.source != job.base and earlier.is_dir()
        add_adapters(student, lora, seed=job.train.seed, weights=earlier if goes_on else None)
    return StageModel(run.spec, student=student, recalibrator=recalibrator, teacher_head=teacher_head)


def _build_recalibrator(job: Job, student: Any, *, trained: Path | None) -> Recalibrator:
    options = job.train.recalibrator
    config = RecalibratorConfig(
        student_config=student.config.get_text_config(),
        teacher_hidden=job.cache.hidden_size,
        num_blocks=options.num_blocks,
        output_norm=options.output_norm,
        projection_bias=options.projection_bias,
        positions=options.positions,
        rope_theta=options.rope_theta,
        gradient_checkpointing=job.train.gradient_checkpointing,
    )
    torch.manual_seed(job.train.seed)
    recalibrator = Recalibrator(config).to(getattr(torch, job.student.dtype))
    if trained is not None:
        recalibrator.load_state_dict(load_file(trained))
    elif options.init_from_student:
        recalibrator.copy_blocks(student.get_decoder().layers)
    return recalibrator


def _publish(job: Job) -> None:
    """Copy the last stage's student to where users look for it."""
    target = _published(job)
    if job.processes.rank == 0:
        staging = target.with_name(f".{target.name}.partial")
        remove(staging)
        shutil.copytree(job.stage_dir(job.stages[-1]) / "export", staging)
        remove(target)
        staging.rename(target)
    job.processes.barrier()


def _published(job: Job) -> Path:
    return job.output_dir / "students" / job.student.name


def _read_done(directory: Path) -> dict[str, Any] | None:
    path = directory / DONE
    return parse_document(path.read_bytes(), where=str(path)) if path.exists() else None
