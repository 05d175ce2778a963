"""Train one student through its stages; resumes by itself and skips what is done."""

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from distill.checkpoint import require_same_run, write_durably
from distill.config import STAGES, Stage, StudentConfig, TrainConfig
from distill.encoder import SampleReader, StudentEncoder
from distill.engine import Engine
from distill.export import export_adapters, export_recalibrator, export_student
from distill.folder_lock import TrainingBusy, locked_folder
from distill.live import TargetSource
from distill.loop import run_steps
from distill.own_recalibrator import check_recalibrator
from distill.processes import Processes
from distill.signals import noted_signals
from distill.stage_setup import DONE, Job, StageRun, build_model, own_stages, read_done, set_up_stage
from distill.step import Loop
from distill.student import resolve_model
from distill.watchdog import Watchdog, collective_timeout
from distill.watching import watch_stage
from distill.zero import check_before_start, launched_processes, make_engine
from teacher_cache import open_cache
from teacher_cache.chat import end_of_turn, load_processor
from teacher_cache.config import CacheConfig
from teacher_cache.documents import encode_document
from teacher_cache.durable_files import remove, sync_folder, sync_names_above, sync_tree
from teacher_cache.errors import ConfigError
from teacher_cache.sample_file import scan_samples

logger = logging.getLogger(__name__)


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
        TrainingBusy: Another training is at work on this student, in the same folder.
    """
    chosen = choose_stages(stages, student=student, train=train)
    check_before_start(train, stages=chosen, dtype=student.dtype)
    with (
        launched_processes(
            backend=train.backend, num_processes=train.num_processes, timeout=collective_timeout(train)
        ) as processes,
        noted_signals() as signals,
        Watchdog() as watchdog,
        _alone(output_dir / "training" / student.name, processes),
    ):
        watchdog.expect(f"{student.name}: the start", within_s=train.slow_timeout_s)
        base = resolve_model(student.model, revision=student.revision)
        check_recalibrator(base, student=student, train=train, stages=chosen)
        processor = load_processor(str(base), trust_remote_code=student.trust_remote_code)
        if end_of_turn(processor) is None:
            logger.warning(
                "the chat template of %s ends no answer with a special token: %s is not taught to stop",
                base,
                student.name,
            )
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
        if chosen[-1] == job.stages[-1] and (any(trained) or not _is_published(job)):
            _publish(job)


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


@contextmanager
def _alone(folder: Path, processes: Processes) -> Iterator[None]:
    """Hold the student's folder for the first process; where that is refused, all processes end together."""
    with ExitStack() as held:
        refusal = None
        if processes.rank == 0:
            try:
                held.enter_context(locked_folder(folder))
            except TrainingBusy as error:
                refusal = error
        if processes.sum([float(refusal is not None)])[0]:
            raise refusal or TrainingBusy(f"{folder} is in use; the first process says by whom")
        yield


def _run_stage(job: Job, stage: Stage) -> bool:
    """Train a stage unless it is done; return whether it was trained."""
    label = f"{job.student.name} {stage}"
    job.watchdog.expect(f"{label}: the set-up", within_s=job.train.slow_timeout_s)
    run = set_up_stage(job, stage)
    _stop_if_asked(job, label)
    done = read_done(run.directory)
    if done is not None:
        require_same_run(stored=done["identity"], asked=run.record.identity, where=run.directory)
        logger.info("%s is done: skipped", label)
        return False
    run.directory.mkdir(parents=True, exist_ok=True)
    model = build_model(job, run)
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
        _export(job, run, engine)
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


def _export(job: Job, run: StageRun, engine: Engine) -> None:
    """Write what the next stage, and users, start from; every process calls this."""
    export_student(engine, run.directory / "export", source=job.base, dtype=job.student.dtype, processes=job.processes)
    export_recalibrator(engine, run.directory / "recalibrator.safetensors", processes=job.processes)
    if job.student.lora is not None:
        export_adapters(
            engine,
            run.directory / "adapter",
            config=job.student.lora,
            base=job.student.model,
            processes=job.processes,
        )


def _stop_if_asked(job: Job, label: str) -> None:
    """End all processes together when a signal came to any of them while there was no step to finish."""
    if job.processes.sum([float(job.signals.received > 0)])[0]:
        logger.info("%s stopped by a signal before its first step; nothing is lost", label)
        raise SystemExit(128 + job.signals.number)


def _publish(job: Job) -> None:
    """Copy the last stage's student to where users look for it."""
    target = _published(job)
    if job.processes.rank == 0:
        staging = target.with_name(f".{target.name}.partial")
        remove(staging)
        shutil.copytree(job.stage_dir(job.stages[-1]) / "export", staging)
        sync_tree(staging)
        remove(target)
        staging.rename(target)
        sync_folder(target.parent)
        sync_names_above(target)
    job.processes.barrier()


def _is_published(job: Job) -> bool:
    """Whether the first process sees the student: what others see may lag behind, and all must agree."""
    return bool(job.processes.sum([float(job.processes.rank == 0 and _published(job).exists())])[0])


def _published(job: Job) -> Path:
    return job.output_dir / "students" / job.student.name
