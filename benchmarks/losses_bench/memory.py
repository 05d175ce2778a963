"""Peak memory of one forward and backward pass beside its inputs, each in a process of its own."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from cache_bench.figures import Figure

from losses_bench import sides
from losses_bench.sides import Shape, make_problem

SECTION = "memory"
BAR = 0.10
SIDES = {"genrecal": sides.own, **sides.CE_KL, "TRL, KL alone": sides.trl_kl}
MIB = 2**20


def measure(shape: Shape) -> Iterator[Figure]:
    """Yield the peak of each side as a share of the dense computation's."""
    dense = peak_bytes("dense torch", shape)
    assert isinstance(dense, int)
    for name in SIDES:
        if name == "dense torch":
            continue
        peak = peak_bytes(name, shape)
        measured = isinstance(peak, int)
        yield Figure(
            section=SECTION,
            name=f"{name}: peak extra memory, share of dense torch",
            value=peak / dense if isinstance(peak, int) else None,
            unit="of dense",
            bar=BAR if name == "genrecal" else None,
            at_most=True,
            note=f"{peak / MIB:.0f} of {dense / MIB:.0f} MiB" if measured else str(peak),
        )


def peak_bytes(side: str, shape: Shape) -> int | str:
    """Return the peak in a fresh process, or why there is none."""
    command = [sys.executable, "-m", "losses_bench.memory", side, *map(str, (shape.tokens, shape.vocab, shape.hidden))]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    # a library may have printed something before
    return (
        int(done.stdout.split()[-1])
        if done.returncode == 0
        else f"does not run: {done.stderr.strip().splitlines()[-1]}"
    )


def _measure_here(side: str, shape: Shape) -> int:
    problem = make_problem(shape)
    # libraries and thread pools are no part of it
    SIDES[side](make_problem(Shape(tokens=8, vocab=64, hidden=8)))
    # 5: the peak starts over
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    SIDES[side](problem)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    print(_measure_here(sys.argv[1], Shape(tokens=int(sys.argv[2]), vocab=int(sys.argv[3]), hidden=int(sys.argv[4]))))
