"""Value and gradient of the losses against a dense computation in float64."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from cache_bench.figures import Figure

from losses_bench.sides import Problem, Shape, Side, dense, make_problem, own

SECTION = "exactness"
REGIMES = {
    "random": (Shape(tokens=64, vocab=8_192, hidden=256), 1.0),
    "saturated": (Shape(tokens=64, vocab=8_192, hidden=256), 300.0),
    "wide vocabulary": (Shape(tokens=8, vocab=152_064, hidden=64), 1.0),
    "one row": (Shape(tokens=1, vocab=8_192, hidden=256), 1.0),
}
BF16_BOUND = 2**-8
"""The gradient is rounded once, to the 8 significant bits of bfloat16."""


def measure(*, quick: bool, device: str = "cpu") -> Iterator[Figure]:
    """Yield relative L2 errors, in millionths for float32."""
    for name, (shape, size) in REGIMES.items():
        if quick:
            shape = replace(shape, vocab=min(shape.vocab, 2_000))
        problem = make_problem(shape, size=size, device=device)
        found = zip(("value", "gradient"), errors(own, problem), errors(dense, problem), strict=True)
        for what, error, dense_error in found:
            note = f"dense torch in float32: {dense_error * 1e6:.2f}"
            name_of_error = f"float32, {name}: relative error of the {what}"
            yield _figure(name_of_error, error * 1e6, unit="millionths", bar=1.0, note=note)
    value, gradient = errors(own, make_problem(REGIMES["random"][0], dtype=torch.bfloat16, device=device))
    yield _figure("bfloat16: relative error of the value", value * 1e6, unit="millionths", bar=1.0)
    note = f"in units of 2^-8 = {BF16_BOUND:.4f}, half a unit in the last place at most per element"
    yield _figure("bfloat16: relative error of the gradient", gradient / BF16_BOUND, unit="units", bar=1.0, note=note)


def errors(side: Side, problem: Problem) -> tuple[float, float]:
    """Return the relative errors of value and gradient."""
    exact = Problem(
        rows=problem.rows.double(),
        teacher_rows=problem.teacher_rows.double(),
        weight=problem.weight.double(),
        labels=problem.labels,
    )
    value, gradient = (
        float((found.double() - expected).norm() / expected.norm())
        for found, expected in zip(side(problem), dense(exact), strict=True)
    )
    return value, gradient


def _figure(name: str, value: float, *, unit: str, bar: float, note: str = "") -> Figure:
    return Figure(section=SECTION, name=name, value=value, unit=unit, bar=bar, at_most=True, note=note)
