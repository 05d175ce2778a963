"""One optimizer step: forward and backward over its micro-batches, the verdict, the update or none."""

import itertools
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from distill.batch import Batch
from distill.call_order import UNLIKE, require_same_calls, shared_signature
from distill.checkpoint import Record
from distill.config import STAGES, StageConfig, TrainConfig
from distill.data import JoinedData, RankBatch
from distill.engine import Engine
from distill.faults import Fault, FaultState, Share, find_fault, finite, gather
from distill.gaps import question_shuffle_gap
from distill.loader import RankBatches
from distill.metrics import learning_rate, loss_metrics
from distill.order import SampleOrder
from distill.processes import Processes
from distill.signals import Interrupted, Signals
from distill.skipped import SkippedSamples
from distill.stage_sums import Counts, StageLosses, Totals, batch_counts
from distill.throughput import StepClock, step_work, throughput_metrics
from distill.watchdog import Watchdog
from distill.watching import Watching

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
    max_skipped_samples: int
    processes: Processes
    signals: Signals
    watchdog: Watchdog
    watching: Watching


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What a step is over all processes."""

    counts: Counts
    """Supervised tokens of the global batch."""
    micro_batches: int
    """Of every process: the most that any has, fillers for the others."""
    skips: int
    """Bad samples that were left out."""


@dataclass(frozen=True, kw_only=True)
class Forwarded:
    """A step's sums over all processes, before the update."""

    counts: Counts
    totals: dict[str, float]
    """By the names of `Totals`."""
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


def take_step(
    loop: Loop, batches: RankBatches, *, step: int, state: FaultState, skipped: SkippedSamples
) -> Outcome | None:
    """Take one step; None where a signal to any process came before it began: nothing is changed then."""
    clock, waited_s = StepClock(loop.processes.device), batches.waited_s
    part = _wait(loop, batches)
    agreed = _agree(loop, part, batches)
    if agreed is None:
        return None
    if agreed.skips:
        skipped.add(itertools.chain(*gather(part.skipped, loop.processes)), step=step + 1)
    micro_batches = batches.on_device(part.micro_batches, num=agreed.micro_batches)
    forwarded = _accumulate(loop, part, micro_batches, counts=agreed.counts, step=step, clock=clock)
    losses = loss_metrics(forwarded.totals, agreed.counts, spec=loop.data.spec)
    rate = learning_rate(loop.config, step=step, max_steps=loop.max_steps)
    with clock.part("optimizer"):
        norm = loop.engine.gradient_norm()
    fault = _find_fault(loop, forwarded, state=state, loss=losses["train/loss"], norm=norm, step=step)
    if fault is None:
        with clock.part("optimizer"):
            loop.engine.step(learning_rate=rate)
        state = state.made(losses["train/loss"], norm, window=loop.train.faults.spike_window)
    else:
        loop.engine.discard()
        state = state.skipped()
    watching = loop.watching
    work = step_work(part.micro_batches, flops=watching.flops, waited_s=batches.waited_s - waited_s)
    record = {
        "global_step": step + 1,
        **losses,
        "optim/lr": rate,
        "optim/grad_norm": norm,
        "optim/skipped_updates": state.skipped_updates,
        "data/skipped_samples": len(skipped),
        **throughput_metrics(work, seconds=clock.read(), processes=loop.processes, peak_tflops=watching.peak_tflops),
    }
    if fault is None and measures_gap(loop, step=step):
        most = max(part.micro_batches, key=lambda batch: len(batch.sample_ids), default=None)
        (batch,) = batches.on_device([most] if most else [], num=1)
        record |= question_shuffle_gap(loop.engine, batch, processes=loop.processes)
    return Outcome(record=_finite_only(record), state=state, fault=fault)


def _wait(loop: Loop, batches: RankBatches) -> RankBatch:
    """Return this process's part of the step, or nothing when a signal comes first."""
    try:
        with loop.signals.interrupting():
            return next(batches)
    except Interrupted:
        return RankBatch(micro_batches=(), skipped=())


def _agree(loop: Loop, part: RankBatch, batches: RankBatches) -> Agreement | None:
    """Return what the step of all processes is; None where any of them is to stop.

    Raises:
        GenrecalError: The processes would call different modules in one of the step's forward passes.
    """
    own = [0.0] * len(Counts._fields)
    for batch in part.micro_batches:
        own = [total + count for total, count in zip(own, batch_counts(batch), strict=True)]
    passes = (len(part.micro_batches), shared_signature(part.micro_batches))
    everyone = np.array(loop.processes.gather([*own, len(part.skipped), loop.signals.received > 0, *passes]))
    *sums, skips, stops, _, _ = everyone.sum(0).tolist()
    if stops:
        return None
    micro_batches = max(1, int(everyone[:, -2].max()))
    # as a rule all have as many, and all bring the same tensors: then nothing more needs to be exchanged
    if len(np.unique(everyone[:, -2:], axis=0)) > 1 or passes[1] == UNLIKE:
        fillers = batches.on_device([], num=micro_batches - len(part.micro_batches))
        require_same_calls([*part.micro_batches, *fillers], processes=loop.processes)
    return Agreement(counts=Counts(*sums), micro_batches=micro_batches, skips=int(skips))


def _accumulate(
    loop: Loop, part: RankBatch, micro_batches: Iterable[Batch], *, counts: Counts, step: int, clock: StepClock
) -> Forwarded:
    """Run forward and backward over a process's micro-batches; losses that are not finite go through like others."""
    processes, model = loop.processes, loop.engine.model
    # dropout is a function of step and process, also after a resume
    seed = [loop.train.seed, STAGES.index(loop.data.spec.stage), step, processes.rank]
    _seed_dropout(int(np.random.SeedSequence(seed).generate_state(1)[0]), device=processes.device)
    if not model.training:
        model.train()
    model.refusals.clear()
    parts = []
    for batch in micro_batches:
        with clock.part("forward"):
            losses: StageLosses = loop.engine.forward(batch=batch, counts=counts)
        with clock.part("backward"):
            loop.engine.backward(losses.loss)
        parts.append(torch.stack(list(losses.totals)))
    totals = torch.stack(parts)
    good = totals.isfinite().all(1).tolist()
    suspects = [batch for batch, fine in zip(part.micro_batches, good, strict=False) if not fine]
    share = Share(
        rank=processes.rank,
        sample_ids=tuple(id_ for batch in suspects or part.micro_batches for id_ in batch.sample_ids),
        reasons=tuple(dict.fromkeys(model.refusals)),
    )
    sums = processes.sum(totals.double().sum(0).tolist())
    return Forwarded(
        counts=counts,
        totals=dict(zip(Totals._fields, sums, strict=True)),
        share=share,
        is_suspect=bool(suspects),
    )


def _seed_dropout(seed: int, *, device: torch.device) -> None:
    """Seed the CPU's generator and a GPU's: torch.manual_seed keeps a stack trace per call where there is no GPU."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


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


def measures_gap(loop: Loop, *, step: int) -> bool:
    """Whether the question-shuffle gap is measured with a step."""
    due = (step + 1) % loop.train.shuffle_gap_interval_steps == 0 or step + 1 == loop.max_steps
    return due and loop.data.spec.with_recalibrator


def _finite_only(record: Mapping[str, float]) -> dict[str, float]:
    # JSON has no other numbers
    return {name: value for name, value in record.items() if finite(value) is not None}
