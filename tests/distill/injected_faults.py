"""Faults put into chosen steps of a run: values that are not finite, and spikes."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from distill import loop as loop_module
from distill.batch import Batch
from distill.faults import FaultState
from distill.loader import RankBatches
from distill.skipped import SkippedSamples
from distill.stage_sums import StageLosses
from distill.stages import StageModel
from distill.step import Loop, Outcome, take_step

Forward = Callable[..., Any]


def bad_targets(value: float) -> Forward:
    """Put a value into one of the teacher's rows."""

    def change(forward: Forward, batch: Batch, **inputs: Any) -> StageLosses:
        assert batch.main is not None
        rows = batch.main.tier_a.clone()
        # the one row of a turn that only targets hold, not inputs too
        rows[batch.main.teacher_index[0], 0] = value
        return forward(dataclasses.replace(batch, main=dataclasses.replace(batch.main, tier_a=rows)), **inputs)

    return change


def bad_inputs(forward: Forward, batch: Batch, **inputs: Any) -> StageLosses:
    """Put NaN into the student's images."""
    model_inputs = {
        name: value * math.nan if value.is_floating_point() else value
        for name, value in batch.student.model_inputs.items()
    }
    student = dataclasses.replace(batch.student, model_inputs=model_inputs)
    return forward(dataclasses.replace(batch, student=student), **inputs)


def scaled_loss(factor: float) -> Forward:
    """Multiply the loss, and so the gradient."""

    def change(forward: Forward, batch: Batch, **inputs: Any) -> StageLosses:
        losses = forward(batch, **inputs)
        totals = type(losses.totals)(*(total * factor for total in losses.totals))
        return StageLosses(losses.loss * factor, totals)

    return change


def scaled_gradient(factor: float) -> Forward:
    """Multiply the gradient and leave the loss."""

    def change(forward: Forward, batch: Batch, **inputs: Any) -> StageLosses:
        losses = forward(batch, **inputs)
        return StageLosses(_scale_gradient(losses.loss, factor), losses.totals)

    return change


@contextlib.contextmanager
def injected(faults: Mapping[int, Forward]) -> Iterator[None]:
    """Let the forward passes of these steps (from 1) go wrong, their first micro-batch only."""
    now = {"step": 0, "passes": 0}
    forward = StageModel.forward

    def noting(loop: Loop, batches: RankBatches, *, step: int, **others: Any) -> Outcome | None:
        now.update(step=step + 1, passes=0)
        return take_step(loop, batches, step=step, **others)

    def changed(model: StageModel, batch: Batch | None = None, **inputs: Any) -> Any:
        if "counts" not in inputs or now["passes"] or now["step"] not in faults:
            return forward(model, batch, **inputs)
        now["passes"] += 1
        return faults[now["step"]](lambda *args, **kwargs: forward(model, *args, **kwargs), batch, **inputs)

    with mock.patch.object(loop_module, "take_step", noting), mock.patch.object(StageModel, "forward", changed):
        yield


@contextlib.contextmanager
def passed_over(steps: set[int]) -> Iterator[None]:
    """Let these steps (from 1) never happen: their batches are not even looked at."""

    def passing(
        loop: Loop, batches: RankBatches, *, step: int, state: FaultState, skipped: SkippedSamples
    ) -> Outcome | None:
        if step + 1 not in steps:
            return take_step(loop, batches, step=step, state=state, skipped=skipped)
        next(batches)
        return Outcome(record={"global_step": step + 1}, state=state.skipped())

    with mock.patch.object(loop_module, "take_step", passing):
        yield


def _scale_gradient(loss: Tensor, factor: float) -> Tensor:
    scaled = loss * 1.0
    scaled.register_hook(lambda gradient: gradient * torch.tensor(factor, dtype=gradient.dtype))
    return scaled
