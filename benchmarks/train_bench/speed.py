"""Align and distill steps from the cache against the same steps with the teacher live, and what the FLOPs predict."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from cache_bench.figures import Figure, quartiles, ratio_figure

from distill.config import Stage, TrainConfig
from distill.data import JoinedData
from distill.processes import Processes
from distill.stages import StageModel
from distill.zero import make_engine
from teacher_cache import open_cache
from train_bench.flops import count_flops
from train_bench.inputs import Inputs, num_parameters
from train_bench.stage import make_data, make_model, make_spec, micro_batches, take_step, total_counts

SECTION = "speed"
STAGES: tuple[Stage, ...] = ("align", "distill")
BARS: dict[Stage, float] = {"align": 4.0, "distill": 3.0}
PREDICTION_BAR = 0.85


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One stage."""

    cached_s: list[float]
    live_s: list[float]
    cached_flops: int
    """Of one optimizer step."""
    live_flops: int


def measure(inputs: Inputs, processes: Processes) -> Iterator[Figure]:
    """Yield the speed of both stages, and the number of students from which the cache pays."""
    measured: dict[Stage, Measured] = {}
    for stage in STAGES:
        measured[stage] = _measure_stage(inputs, stage, processes)
        yield from _figures(inputs, stage, measured[stage])
    yield _break_even(inputs, measured)


def _measure_stage(inputs: Inputs, stage: Stage, processes: Processes) -> Measured:
    """Take the same optimizer step with targets from both sides in turn; both sides wait for their targets."""
    settings, student = inputs.settings, next(iter(inputs.students.values()))
    train = TrainConfig.model_validate({stage: settings.stage})
    spec = make_spec(stage, train)
    cache = open_cache(inputs.cache.uri)
    sides = {
        "cached": make_data(inputs, cache, student=student, spec=spec),
        "live": make_data(inputs, inputs.captured.live, student=student, spec=spec),
    }
    model = make_model(cache, student=student, spec=spec)
    flops = {name: count_flops(lambda data=data: _run_model(model, data, inputs)) for name, data in sides.items()}
    model.zero_grad()
    engine = make_engine(model, stage=stage, train=train, dtype=student.dtype, processes=processes)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    rng = np.random.default_rng(0)
    for pair in range(settings.step_pairs + 1):
        for name in rng.permutation(list(sides)).tolist():
            start = time.perf_counter()
            take_step(engine, micro_batches(sides[name], settings.stage))
            if pair:
                seconds[name].append(time.perf_counter() - start)
    engine.close()
    return Measured(
        cached_s=seconds["cached"], live_s=seconds["live"], cached_flops=flops["cached"], live_flops=flops["live"]
    )


def _run_model(model: StageModel, data: JoinedData, inputs: Inputs) -> None:
    model.train()
    batches = micro_batches(data, inputs.settings.stage)
    counts = total_counts(batches)
    for batch in batches:
        model(batch=batch, counts=counts).loss.backward()


def _figures(inputs: Inputs, stage: Stage, measured: Measured) -> Iterator[Figure]:
    teacher_flops = measured.live_flops - measured.cached_flops
    predicted = measured.live_flops / measured.cached_flops
    seconds = {name: statistics.median(one) for name, one in (("c", measured.cached_s), ("l", measured.live_s))}
    samples = inputs.settings.stage["global_batch_size"]
    note = (
        f"{seconds['c']:.2f} s and {seconds['l']:.2f} s a step of {samples} samples; "
        f"teacher of {num_parameters(inputs) / 1e6:.0f} M parameters on {torch.get_num_threads()} threads"
    )
    yield ratio_figure(
        SECTION,
        f"{stage}: a step from the cache, against the teacher live",
        base_s=measured.live_s,
        own_s=measured.cached_s,
        bar=BARS[stage],
        note=note,
        json_name=f"{stage}_speedup_over_live_teacher",
    )
    shares = [live / cached / predicted for live, cached in zip(measured.live_s, measured.cached_s, strict=True)]
    low, middle, high = quartiles(shares)
    yield Figure(
        section=SECTION,
        name=f"{stage}: share of what the FLOPs predict",
        value=middle,
        unit="of the prediction",
        bar=PREDICTION_BAR,
        low=low,
        high=high,
        pairs=len(shares),
        note=(
            f"predicted {predicted:.2f} x: {measured.cached_flops / 1e9:.1f} GFLOP a step, the teacher "
            f"{teacher_flops / 1e9:.1f} more; {measured.cached_flops / seconds['c'] / 1e9:.0f} GFLOP/s from the cache, "
            f"{teacher_flops / (seconds['l'] - seconds['c']) / 1e9:.0f} in the teacher"
        ),
        json_name=f"{stage}_share_of_predicted_speedup",
    )


def _break_even(inputs: Inputs, measured: dict[Stage, Measured]) -> Figure:
    """Return how many students must share the cache before its capture is paid, at one epoch in each stage."""
    settings = inputs.settings
    steps = settings.num_samples / settings.stage["global_batch_size"]
    saved_s = steps * sum(statistics.median(one.live_s) - statistics.median(one.cached_s) for one in measured.values())
    return Figure(
        section=SECTION,
        name="students from which the cache pays, capture included",
        value=inputs.captured.seconds / saved_s,
        unit="students",
        note=(
            f"capture of {settings.num_samples} samples {inputs.captured.seconds:.1f} s (teacher loaded), saved per "
            f"student in one epoch of align and of distill {saved_s:.1f} s"
        ),
        json_name="break_even_students",
    )
