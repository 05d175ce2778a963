"""Time of one forward and backward pass against dense torch and other libraries, run in turn on the same inputs."""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from cache_bench.figures import Figure, ratio_figure

from losses_bench import sides
from losses_bench.sides import Problem, Shape, Side, make_problem

SECTION = "speed"
BAR = 1.0


def measure(shape: Shape, *, pairs: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Figure]:
    """Yield our speed against each side, for cross-entropy with KL and for KL alone."""
    problem = make_problem(shape, device=device, dtype=dtype)
    yield from _against(sides.CE_KL, sides.own, "CE + KL", pairs=pairs, problem=problem)
    yield from _against(sides.KL, sides.own_kl, "KL", pairs=pairs, problem=problem)


def _against(others: Mapping[str, Side], own: Side, task: str, *, pairs: int, problem: Problem) -> Iterator[Figure]:
    on_gpu = problem.rows.is_cuda
    run: dict[str, Callable[[], object]] = {"genrecal": lambda: own(problem)}
    small = make_problem(Shape(tokens=16, vocab=64, hidden=8), device=str(problem.rows.device))
    for name, side in others.items():
        try:
            side(small)
        except (ImportError, RuntimeError) as error:
            yield Figure(section=SECTION, name=f"{task} against {name}", value=None, bar=BAR, note=f"{error!r}")
        else:
            run[name] = lambda side=side: side(problem)
    seconds = _interleaved(run, pairs=pairs, wait=torch.cuda.synchronize if on_gpu else lambda: None)
    own_s = seconds.pop("genrecal")
    for name, other_s in seconds.items():
        note = f"{statistics.median(own_s):.3g} s, {name} {statistics.median(other_s):.3g} s"
        yield ratio_figure(SECTION, f"{task} against {name}", base_s=other_s, own_s=own_s, bar=BAR, note=note)


def _interleaved(
    sides_to_run: Mapping[str, Callable[[], object]], *, pairs: int, wait: Callable[[], None]
) -> dict[str, list[float]]:
    """Run all sides in turn, in another order each time, after one round that does not count."""
    rng = random.Random(1)
    seconds: dict[str, list[float]] = {name: [] for name in sides_to_run}
    for pair in range(pairs + 1):
        for name in rng.sample(list(sides_to_run), len(sides_to_run)):
            start = time.perf_counter()
            sides_to_run[name]()
            wait()
            if pair:
                seconds[name].append(time.perf_counter() - start)
    return seconds
