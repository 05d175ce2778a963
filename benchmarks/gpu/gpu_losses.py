"""The losses on a device: checked against float64, timed and weighed against dense torch and other libraries."""

from collections.abc import Iterator
from pathlib import Path

import torch
from cache_bench.figures import Figure
from losses_bench import sides, speed
from losses_bench.sides import Problem, Shape, make_problem
from timing import peak_extra_bytes

FULL = Shape(tokens=2048, vocab=152_064, hidden=3584)
QUICK = Shape(tokens=128, vocab=512, hidden=16)
CHECKED = Shape(tokens=300, vocab=8_192, hidden=256)
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
"""Of the gradient's relative error; on CUDA bfloat16 rounds the softmax differences before their product."""


def measure(*, device: str, quick: bool, folder: Path) -> Iterator[Figure]:
    """Yield errors, speeds and the share of dense memory."""
    for dtype, bound in BOUNDS.items():
        yield _check(dtype, bound, device)
    shape = QUICK if quick else FULL
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    yield from speed.measure(shape, pairs=2 if quick else 5, device=device, dtype=dtype)
    if device == "cuda":
        problem = make_problem(shape, device=device, dtype=dtype)
        own, dense = (peak_extra_bytes(lambda side=side: side(problem)) for side in (sides.own, sides.dense))
        yield Figure(
            section="losses",
            name="peak extra memory, share of dense torch",
            value=own / dense,
            unit="of dense",
            note=f"{own / 2**20:.0f} of {dense / 2**20:.0f} MiB",
        )


def _check(dtype: torch.dtype, bound: float, device: str) -> Figure:
    problem = make_problem(CHECKED, device=device, dtype=dtype)
    exact = Problem(
        rows=problem.rows.double(),
        teacher_rows=problem.teacher_rows.double(),
        weight=problem.weight.double(),
        labels=problem.labels,
    )
    (value, gradient), (expected_value, expected_gradient) = sides.own(problem), sides.dense(exact)
    errors = [
        float((found.double() - expected).norm() / expected.norm())
        for found, expected in ((value, expected_value), (gradient, expected_gradient))
    ]
    return Figure(
        section="losses check",
        name=f"{dtype}: relative error, in units of its bound",
        value=max(errors) / bound,
        unit="units",
        bar=1,
        at_most=True,
        note=f"value {errors[0]:.1e}, gradient {errors[1]:.1e}, bound {bound:.1e}",
    )
