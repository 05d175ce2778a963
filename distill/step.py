"""One optimizer step: forward and backward over its micro-batches, the verdict, the update or none."""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from distill.batch import Batch, to_device
from distill.checkpoint import Record
from distill.config import STAGES, StageConfig, TrainConfig
from distill.data import JoinedData, SampleOrder
from distill.engine import Engine
from distill.faults import Fault, FaultState, Share, find_fault, finite, gather
from distill.metrics import gap_metrics, learning_rate, loss_metrics
from distill.processes import Processes
from distill.signals import Interrupted, Signals
from distill.stages import Counts, ShuffleSums, StageLosses, Totals, batch_counts
from distill.watchdog import Watchdog

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
    record: Record
    """Of every checkpoint, but for step and state."""
    directory: Path
    label: str
    processes: Processes
    signals: Signals
    watchdog: Watchdog


@dataclass(frozen=True, kw_only=True)
class Forwarded:
    """A step's sums over all processes, before the update."""

    counts: Counts
    totals: dict[str, float]
    """By the names of `Totals`."""
    tokens: float
    share: Share
    """This process's samples: those whose losses are not finite, all where there are none."""
    is_suspect: bool
    """Whether losses of this process are not finite."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a step."""

    record: dict[str, float]
    """Metrics."""
    state: FaultState
    fault: Fault | None = None
    """Why there was no update."""


def take_step(loop: Loop, batches: Iterator[list[Batch]], *, step: int, state: FaultState) -> Outcome | None:
    """Take one step; None where a signal to any process came before it began: nothing is changed then."""
    began = time.perf_counter()
    micro_batches = _wait(loop, batches)
    waited = time.perf_counter() - began
    counts = _agree(loop, micro_batches)
    if counts is None:
        return None
    forwarded = _accumulate(loop, micro_batches, counts=counts, step=step)
    losses = loss_metrics(forwarded.totals, counts, spec=loop.data.spec)
    rate = learning_rate(loop.config, step=step, max_steps=loop.max_steps)
    norm = loop.engine.gradient_norm()
    fault = _find_fault(loop, forwarded, state=state, loss=losses["train/loss"], norm=norm, step=step)
    if fault is None:
        loop.engine.step(learning_rate=rate)
        state = state.made(losses["train/loss"], norm, window=loop.train.faults.spike_window)
    else:
        loop.engine.discard()
        state = state.skipped()
    step_s = time.perf_counter() - began
    record = {
        "global_step": step + 1,
        **losses,
        "optim/lr": rate,
        "optim/grad_norm": norm,
        "optim/skipped_updates": state.skipped_updates,
        "throughput/tokens_per_s": forwarded.tokens / step_s,
        "throughput/samples_per_s": loop.config.global_batch_size / step_s,
        "data/wait_fraction": waited / step_s,
        "data/skipped_samples": loop.data.encoder.num_skipped,
        "time/step_s": step_s,
    }
    if fault is None and _measures_gap(loop, step=step):
        record |= _question_shuffle_gap(loop, micro_batches[-1])
    return Outcome(record=_finite_only(record), state=state, fault=fault)


def _wait(loop: Loop, batches: Iterator[list[Batch]]) -> list[Batch]:
    """Return the next micro-batches, or none when a signal comes first."""
    try:
        with loop.signals.interrupting():
            share = next(batches)
    except Interrupted:
        return []
    return [to_device(batch, loop.processes.device) for batch in share]


def _agree(loop: Loop, micro_batches: list[Batch]) -> Counts | None:
    """Return the supervised tokens of the global batch; None where any process is to stop."""
    own = (
        np.sum([batch_counts(batch) for batch in micro_batches], axis=0)
        if micro_batches
        else np.zeros(len(Counts._fields))
    )
    *sums, stops = loop.processes.sum([*own.tolist(), float(loop.signals.received > 0)])
    return None if stops else Counts(*sums)


def _accumulate(loop: Loop, micro_batches: list[Batch], *, counts: Counts, step: int) -> Forwarded:
    """Run forward and backward over a process's micro-batches; losses that are not finite go through like others."""
    processes, model = loop.processes, loop.engine.model
    # dropout is a function of step and process, also after a resume
    seed = [loop.train.seed, STAGES.index(loop.data.spec.stage), step, processes.rank]
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    model.train()
    model.refusals.clear()
    parts = []
    for batch in micro_batches:
        losses: StageLosses = loop.engine.forward(batch=batch, counts=counts)
        loop.engine.backward(losses.loss)
        parts.append(torch.stack(list(losses.totals)))
    totals = torch.stack(parts)
    good = totals.isfinite().all(1).tolist()
    suspects = [batch for batch, fine in zip(micro_batches, good, strict=True) if not fine]
    share = Share(
        rank=processes.rank,
        sample_ids=tuple(id_ for batch in suspects or micro_batches for id_ in batch.sample_ids),
        reasons=tuple(dict.fromkeys(model.refusals)),
    )
    tokens = float(sum(batch.student.attention_mask.sum() for batch in micro_batches))
    *sums, all_tokens = processes.sum([*totals.double().sum(0).tolist(), tokens])
    return Forwarded(
        counts=counts,
        totals=dict(zip(Totals._fields, sums, strict=True)),
        tokens=all_tokens,
        share=share,
        is_suspect=bool(suspects),
    )


def _find_fault(
    loop: Loop, forwarded: Forwarded, *, state: FaultState, loss: float, norm: float, step: int
) -> Fault | None:
    kind, limit = find_fault(state, loss=loss, grad_norm=norm, config=loop.train.faults)
    # all values are sums over all processes, and yet one process that differs must not leave the others waiting
    if not loop.processes.sum([float(bool(kind))])[0]:
        return None
    shares = gather((forwarded.is_suspect, forwarded.share), loop.processes)
    suspects = tuple(share for is_suspect, share in shares if is_suspect)
    return Fault(
        global_step=step + 1,
        kind=kind,
        loss=finite(loss),
        grad_norm=finite(norm),
        limit=limit,
        shares=suspects or tuple(share for _, share in shares),
    )


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


def _finite_only(record: Mapping[str, float]) -> dict[str, float]:
    # JSON has no other numbers
    return {name: value for name, value in record.items() if finite(value) is not None}
