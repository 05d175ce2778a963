"""The optimizer steps of one stage."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.batch import Batch, to_device
from distill.checkpoint import find_checkpoint, save_checkpoint
from distill.config import STAGES, StageConfig, TrainConfig
from distill.data import JoinedData, SampleOrder, global_batches
from distill.engine import Engine
from distill.features import probe_batches, write_features
from distill.metrics import GapWarning, MetricsFile, console_line, gap_metrics, learning_rate, loss_metrics
from distill.processes import Processes
from distill.signals import Signals
from distill.stages import Counts, ShuffleSums, StageLosses, Totals, batch_counts
from teacher_cache.errors import GenrecalError
from teacher_cache.prefetch import Prefetch
from teacher_cache.progress import Progress, progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Everything that one stage's steps need."""

    engine: Engine
    data: JoinedData
    order: SampleOrder
    config: StageConfig
    train: TrainConfig
    max_steps: int
    identity: dict[str, Any]
    directory: Path
    label: str
    processes: Processes
    signals: Signals


@dataclass(frozen=True, kw_only=True)
class Forwarded:
    """A step's sums over all processes, before the update."""

    counts: Counts
    totals: dict[str, float]
    """By the names of `Totals`."""
    tokens: float
    stop: bool


def run_steps(loop: Loop) -> None:
    """Take all steps that are left after the newest checkpoint.

    Raises:
        SystemExit: 128 + n after signal n, once a checkpoint is written.
    """
    start = _resume(loop)
    gap_warning = GapWarning(label=loop.label, max_steps=loop.max_steps)
    _announce(loop)
    probe = probe_batches(loop.data, micro_batch_size=loop.config.micro_batch_size)
    if start == 0:
        write_features(loop.engine, probe, loop.directory / "features_first.safetensors", processes=loop.processes)
    with (
        _batches(loop, start=start) as batches,
        closing(_metrics_file(loop, start=start)) as metrics,
        _progress(loop, start=start) as bar,
    ):
        for step in range(start, loop.max_steps):
            record, stop = _step(loop, batches, step=step, gap_warning=gap_warning)
            metrics.write(record)
            if (step + 1) % loop.train.log_interval_steps == 0 or step + 1 == loop.max_steps:
                _log(loop, record)
            if bar is not None:
                bar.update(1, loss=f"{record['train/loss']:.4f}")
            _save(loop, step=step + 1, stop=stop)
    write_features(loop.engine, probe, loop.directory / "features_last.safetensors", processes=loop.processes)


def _announce(loop: Loop) -> None:
    """Say what this stage does unlike the paper, where that would otherwise show in the results alone."""
    if loop.processes.rank > 0:
        return
    spec = loop.data.spec
    if spec.stage == "distill" and spec.weights.sft == 0:
        logger.warning(
            "%s: sft_weight is 0: the student's own answers teach it nothing, and what the Recalibrator can copy from "
            "the teacher's answer rows does not either. Keep it at 1 unless this is an ablation",
            loop.label,
        )
    if spec.with_recalibrator and loop.config.micro_batch_size == 1:
        logger.warning(
            "%s: the question-shuffle gap is not measured: it swaps rows within a micro-batch, and micro_batch_size "
            "is 1. Set it to 2 or more to see whether the Recalibrator listens to the student",
            loop.label,
        )


def _progress(loop: Loop, *, start: int) -> AbstractContextManager[Progress | None]:
    if loop.processes.rank > 0:
        return nullcontext()
    return progress(total=loop.max_steps, initial=start, unit="step", description=loop.label)


def _resume(loop: Loop) -> int:
    checkpoint = find_checkpoint(loop.directory / "checkpoints", identity=loop.identity, processes=loop.processes)
    if checkpoint is None:
        return 0
    loop.engine.load(checkpoint.directory)
    logger.info("%s resumes after step %d", loop.label, checkpoint.step)
    return checkpoint.step


def _batches(loop: Loop, *, start: int) -> Prefetch[list[Batch]]:
    return Prefetch(
        global_batches(
            loop.data,
            order=loop.order,
            micro_batch_size=loop.config.micro_batch_size,
            rank=loop.processes.rank,
            world_size=loop.processes.world_size,
            start=start,
            stop=loop.max_steps,
        )
    )


def _metrics_file(loop: Loop, *, start: int) -> MetricsFile:
    path = loop.directory / "metrics.jsonl" if loop.processes.rank == 0 else None
    return MetricsFile(path, start_step=start)


def _step(
    loop: Loop, batches: Iterator[list[Batch]], *, step: int, gap_warning: GapWarning
) -> tuple[dict[str, float], bool]:
    """Take one step; return its metrics, and whether a signal asks to stop."""
    began = time.perf_counter()
    micro_batches = [to_device(batch, loop.processes.device) for batch in next(batches)]
    waited = time.perf_counter() - began
    forwarded = _accumulate(loop, micro_batches, step=step)
    rate = learning_rate(loop.config, step=step, max_steps=loop.max_steps)
    norm = loop.engine.step(learning_rate=rate)
    step_s = time.perf_counter() - began
    losses = loss_metrics(forwarded.totals, forwarded.counts, spec=loop.data.spec)
    record = {
        "global_step": step + 1,
        **losses,
        "optim/lr": rate,
        "optim/grad_norm": norm,
        "throughput/tokens_per_s": forwarded.tokens / step_s,
        "throughput/samples_per_s": loop.config.global_batch_size / step_s,
        "data/wait_fraction": waited / step_s,
        "data/skipped_samples": loop.data.encoder.num_skipped,
        "time/step_s": step_s,
    }
    if _measures_gap(loop, step=step):
        gaps = _question_shuffle_gap(loop, micro_batches[-1])
        record |= gaps
        if loop.processes.rank == 0:
            gap_warning.check(gaps, step=step + 1)
    return record, forwarded.stop


def _accumulate(loop: Loop, micro_batches: list[Batch], *, step: int) -> Forwarded:
    """Run forward and backward over a process's micro-batches.

    Raises:
        GenrecalError: The loss is not finite; no update has been made then.
    """
    processes = loop.processes
    counts = Counts(*processes.sum(np.sum([batch_counts(batch) for batch in micro_batches], axis=0).tolist()))
    # dropout is a function of step and process, also after a resume
    seed = [loop.train.seed, STAGES.index(loop.data.spec.stage), step, processes.rank]
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    loop.engine.model.train()
    parts = []
    for batch in micro_batches:
        losses = _forward(loop, batch, counts=counts, step=step)
        loop.engine.backward(losses.loss)
        parts.append(torch.stack(list(losses.totals)))
    totals = torch.stack(parts)
    if not bool(totals.isfinite().all()):
        bad = [batch.sample_ids for batch, sums in zip(micro_batches, totals, strict=True) if not sums.isfinite().all()]
        logger.error("%s step %d: losses are not finite with samples %s", loop.label, step + 1, bad)
    tokens = float(sum(batch.student.attention_mask.sum() for batch in micro_batches))
    values = [*totals.double().sum(0).tolist(), tokens, float(loop.signals.received > 0)]
    *sums, all_tokens, stops = processes.sum(values)
    if not np.isfinite(sums).all():
        raise GenrecalError(
            f"{loop.label}: the loss of step {step + 1} is not finite; the log of one process names the samples. "
            "Lower the learning rate or look at these samples; start again to go on from the last checkpoint."
        )
    return Forwarded(
        counts=counts, totals=dict(zip(Totals._fields, sums, strict=True)), tokens=all_tokens, stop=stops > 0
    )


def _forward(loop: Loop, batch: Batch, *, counts: Counts, step: int) -> StageLosses:
    try:
        losses: StageLosses = loop.engine.forward(batch=batch, counts=counts)
    except ValueError as error:
        raise GenrecalError(
            f"{loop.label}: step {step + 1} failed before its update, with samples {batch.sample_ids}: {error}. If "
            "rows are not finite, lower the learning rate or look at these samples; start again to go on from the "
            "last checkpoint."
        ) from error
    return losses


def _measures_gap(loop: Loop, *, step: int) -> bool:
    due = (step + 1) % loop.train.shuffle_gap_interval_steps == 0 or step + 1 == loop.max_steps
    return due and loop.data.spec.with_recalibrator and loop.config.micro_batch_size > 1


def _question_shuffle_gap(loop: Loop, batch: Batch) -> dict[str, float]:
    """Return what the neighbours' rows cost, over one micro-batch of every process."""
    loop.engine.model.eval()
    with torch.no_grad():
        sums = loop.engine.forward(batch=batch, task="question_shuffle")
    summed = loop.processes.sum([*torch.stack(list(sums)).double().tolist(), *batch_counts(batch)])
    totals = dict(zip(ShuffleSums._fields, summed, strict=False))
    return gap_metrics(totals, Counts(*summed[len(totals) :]))


def _log(loop: Loop, record: Mapping[str, float]) -> None:
    if loop.processes.rank == 0:
        logger.info(console_line(loop.label, max_steps=loop.max_steps, record=record))


def _save(loop: Loop, *, step: int, stop: bool) -> None:
    if stop or (step % loop.train.save_interval_steps == 0 and step < loop.max_steps):
        save_checkpoint(
            loop.engine,
            loop.directory / "checkpoints",
            step=step,
            identity=loop.identity,
            processes=loop.processes,
            keep=loop.train.keep_checkpoints,
        )
    if stop:
        logger.info("%s stopped by a signal after step %d; a checkpoint is written", loop.label, step)
        raise SystemExit(128 + loop.signals.number)
