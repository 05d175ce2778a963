"""The optimizer steps of one stage."""

import logging
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass, replace
from typing import NoReturn

from distill.checkpoint import find_checkpoint, save_checkpoint
from distill.faults import FaultsFile, FaultState, too_many_skips
from distill.features import probe_batches, write_features
from distill.gaps import GapWarning
from distill.loader import RankBatches
from distill.skipped import SkippedSamples
from distill.step import Loop, Outcome, measures_gap, take_step
from distill.step_log import StepLog, open_step_log
from distill.validation import validate

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Position:
    """What a checkpoint resumes: the state after the last update that was made.

    Steps whose update was skipped change nothing, so they are taken again after a resume, under the settings of then.
    """

    step: int
    faults: FaultState


def run_steps(loop: Loop) -> None:
    """Take all steps that are left after the newest checkpoint.

    Raises:
        SystemExit: 128 + n after signal n, once a checkpoint is written.
        GenrecalError: Too many updates in a row could not be made.
    """
    position = _resume(loop)
    _announce(loop)
    if position.step == 0:
        _write_features(loop, "features_first.safetensors")
    if position.step < loop.max_steps:
        _take_steps(loop, position)
    else:
        with _log(loop, start=position.step) as log:
            _catch_up(loop, log, step=position.step)
    if loop.processes.sum([float(loop.signals.received > 0)])[0]:
        # the last checkpoint has everything: the next start begins here
        _stop(loop, step=loop.max_steps)
    _expect(loop, "the end of the stage", is_slow=True)
    _write_features(loop, "features_last.safetensors")


def _write_features(loop: Loop, name: str) -> None:
    # the probe is made anew: its rows of the cache would take gigabytes from the beginning to the end
    probe = probe_batches(loop.data, micro_batch_size=loop.config.micro_batch_size)
    write_features(loop.engine, probe, loop.directory / name, processes=loop.processes)


def _take_steps(loop: Loop, resumed: Position) -> None:
    """Take the steps after a position; the last one has a checkpoint, since the export after it may fail."""
    position = saved = resumed
    start, state = position.step, position.faults
    skipped = _skipped(loop, start=start)
    gap_warning = GapWarning(label=loop.label, max_steps=loop.max_steps)
    with (
        _batches(loop, start=start) as batches,
        closing(_faults_file(loop, start=start)) as faults,
        _log(loop, start=start) as log,
    ):
        _catch_up(loop, log, step=start)
        for step in range(start, loop.max_steps):
            _expect(loop, f"step {step + 1}", is_slow=step == start)
            outcome = take_step(loop, batches, step=step, state=state, skipped=skipped)
            if outcome is None:
                _save(loop, position, saved=saved)
                _stop(loop, step=step)
            state = outcome.state
            log.write({**outcome.record, **_scores(loop, step=step + 1)})
            _report(loop, outcome, gap_warning=gap_warning)
            if outcome.fault is None:
                position = Position(step=step + 1, faults=state)
            else:
                faults.write(outcome.fault)
                _stop_if_hopeless(loop, outcome, position=position, saved=saved)
            if (step + 1) % loop.train.save_interval_steps == 0 or step + 1 == loop.max_steps:
                saved = _save(loop, position, saved=saved)


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


def _log(loop: Loop, *, start: int) -> AbstractContextManager[StepLog]:
    watching = loop.watching
    return open_step_log(
        loop.directory,
        place=watching.place,
        label=loop.label,
        start=start,
        max_steps=loop.max_steps,
        interval_steps=loop.train.log_interval_steps,
        sections=watching.monitors,
        processes=loop.processes,
    )


def _scores(loop: Loop, *, step: int) -> dict[str, float]:
    """Return the student's scores where they are due after a step, unless a signal asks to stop."""
    validation = loop.watching.validation
    if validation is None or not validation.is_due(step, max_steps=loop.max_steps):
        return {}
    if step < loop.max_steps and loop.processes.sum([float(loop.signals.received > 0)])[0]:
        return {}
    _expect(loop, f"the validation after step {step}", is_slow=True)
    return validate(validation, loop.engine, processes=loop.processes, label=f"{loop.label} step {step}")


def _catch_up(loop: Loop, log: StepLog, *, step: int) -> None:
    """Score the student before the first step, or after the one resumed from where a stop came before its scores."""
    if loop.processes.sum([float(step in log.measured)])[0]:
        return
    if scores := _scores(loop, step=step):
        log.write({"global_step": step, **scores})


def _expect(loop: Loop, what: str, *, is_slow: bool) -> None:
    train = loop.train
    loop.watchdog.expect(f"{loop.label}: {what}", within_s=train.slow_timeout_s if is_slow else train.hang_timeout_s)


def _resume(loop: Loop) -> Position:
    _expect(loop, "the resume", is_slow=True)
    checkpoint = find_checkpoint(
        loop.directory / "checkpoints",
        identity=loop.record.identity,
        layout=loop.record.layout,
        processes=loop.processes,
    )
    if checkpoint is None:
        return Position(step=0, faults=FaultState())
    loop.engine.load(checkpoint.directory)
    logger.info("%s resumes after step %d", loop.label, checkpoint.step)
    return Position(step=checkpoint.step, faults=FaultState.from_json(checkpoint.record.state["faults"]))


def _batches(loop: Loop, *, start: int) -> RankBatches:
    return RankBatches(
        loop.data,
        order=loop.order,
        config=loop.config,
        train=loop.train,
        processes=loop.processes,
        start=start,
        stop=loop.max_steps,
    )


def _skipped(loop: Loop, *, start: int) -> SkippedSamples:
    return SkippedSamples(
        loop.directory / "skipped.jsonl",
        allowed=loop.max_skipped_samples,
        start_step=start,
        writes=loop.processes.rank == 0,
    )


def _faults_file(loop: Loop, *, start: int) -> FaultsFile:
    path = loop.directory / "faults.jsonl" if loop.processes.rank == 0 else None
    return FaultsFile(path, start_step=start)


def _report(loop: Loop, outcome: Outcome, *, gap_warning: GapWarning) -> None:
    """Say what people should see of a step."""
    if loop.processes.rank > 0:
        return
    step = int(outcome.record["global_step"])
    if outcome.fault is not None:
        logger.warning("%s step %d: no update is made: %s", loop.label, step, outcome.fault)
    elif measures_gap(loop, step=step - 1):
        gap_warning.check(outcome.record, step=step)


def _save(loop: Loop, position: Position, *, saved: Position) -> Position:
    """Write a checkpoint unless there is one of this position; return the position."""
    if position.step == saved.step:
        return saved
    _expect(loop, f"the checkpoint of step {position.step}", is_slow=True)
    save_checkpoint(
        loop.engine,
        loop.directory / "checkpoints",
        record=replace(loop.record, step=position.step, state={"faults": asdict(position.faults)}),
        processes=loop.processes,
        keep=loop.train.keep_checkpoints,
    )
    return position


def _stop(loop: Loop, *, step: int) -> NoReturn:
    logger.info("%s stopped by a signal after step %d; nothing is lost", loop.label, step)
    raise SystemExit(128 + loop.signals.number)


def _stop_if_hopeless(loop: Loop, outcome: Outcome, *, position: Position, saved: Position) -> None:
    fault, state = outcome.fault, outcome.state
    if fault is not None and state.consecutive_skips > loop.train.faults.max_consecutive_skips:
        _save(loop, position, saved=saved)
        raise too_many_skips(state, fault, label=loop.label)
